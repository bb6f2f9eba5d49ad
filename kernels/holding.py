"""Tensors that a launch reads and does not own: a captured one goes on reading, so that somebody has to hold them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

Tensor = torch.Tensor

_active: ContextVar[list[Tensor] | None] = ContextVar("held_tensors", default=None)


@contextlib.contextmanager
def holding() -> Iterator[list[Tensor]]:
    """Collect what launches inside read from caches that may let it go: as long as the list lives, so does it."""
    held: list[Tensor] = []
    token = _active.set(held)
    try:
        yield held
    finally:
        _active.reset(token)


def hold(tensor: Tensor) -> Tensor:
    """``tensor``, noted where somebody collects."""
    held = _active.get()
    if held is not None:
        held.append(tensor)
    return tensor
