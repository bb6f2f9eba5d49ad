"""Take: a video that is cut into segments, from its beginning or from where a state says it goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch

Tensor = torch.Tensor
Part = Callable[[str], Mapping[str, Tensor]]
"""A part of a state by its name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Take:
    """Segments of at least ``segment_frames`` video frames. ``state``, and ``next_block``, the one that it was taken
    before: where another process has got to."""

    segment_frames: int
    next_block: int = 0
    state: Part | None = None
