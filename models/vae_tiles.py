"""Decoding a latent frame in strips, one after another: a share of the memory, for some pixels computed twice.

A strip is decoded with a margin of its neighbours on either side and cut back afterwards. Convolutions see all that
they need within the margin, nearly; the decoder's one attention layer looks over the strip and not over the whole
frame, so the frames are close to those of the whole and not the same.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

MARGIN = 8
"""Latents. The convolutions at the latent's own resolution, where one pixel weighs most, reach about this far."""

# The library stores a string in the slot of a temporal upsampler that has seen one latent frame only.
Slot = Tensor | str | None


@dataclasses.dataclass(frozen=True)
class Strip:
    """In latents along one side: computed from ``begin`` to ``end``, kept from ``first`` to ``last``."""

    begin: int
    first: int
    last: int
    end: int


def strips(length: int, count: int, margin: int = MARGIN) -> Iterator[Strip]:
    """Cut ``length`` latents into ``count`` strips of about the same width; fewer where there are not as many."""
    edges = sorted({length * i // count for i in range(count + 1)})
    for first, last in itertools.pairwise(edges):
        yield Strip(max(0, first - margin), first, last, min(length, last + margin))


def decode_in_strips(
    run: Callable[[Tensor, list[Slot]], Tensor], z: Tensor, slots: list[Slot], count: int
) -> tuple[Tensor, list[Slot]]:
    """``run(z, slots) -> frames``, which replaces ``slots``, on strips along the longer side of z [B, C, T, h, w].

    Returns the frames [B, 3, T', 8 h, 8 w] and the slots that running on the whole would have left, nearly.
    """
    side = 3 if z.shape[3] > z.shape[4] else 4
    length = z.shape[side]
    frames: Tensor | None = None
    kept: list[Slot] = [None] * len(slots)
    for strip in strips(length, count):
        own: list[Slot] = [_cut(slot, side, length, strip.begin, strip.end) for slot in slots]
        part = run(z.narrow(side, strip.begin, strip.end - strip.begin), own)
        frames = _placed(frames, part, side, length, strip)
        for index, slot in enumerate(own):
            old = kept[index]
            whole = old if isinstance(old, Tensor) else None
            kept[index] = _placed(whole, slot, side, length, strip) if isinstance(slot, Tensor) else slot
    assert frames is not None
    return frames, kept


def _cut(slot: Slot, side: int, length: int, begin: int, end: int) -> Slot:
    if not isinstance(slot, Tensor):
        return slot
    scale = slot.shape[side] // length
    return slot.narrow(side, begin * scale, (end - begin) * scale)


def _placed(whole: Tensor | None, part: Tensor, side: int, length: int, strip: Strip) -> Tensor:
    """``part`` cut back to what the strip keeps, in its place in ``whole``."""
    scale = part.shape[side] // (strip.end - strip.begin)
    if whole is None:
        shape = list(part.shape)
        shape[side] = length * scale
        whole = torch.empty(shape, dtype=part.dtype, device=part.device)
    width = (strip.last - strip.first) * scale
    inner = part.narrow(side, (strip.first - strip.begin) * scale, width)
    whole.narrow(side, strip.first * scale, width).copy_(inner)
    return whole
