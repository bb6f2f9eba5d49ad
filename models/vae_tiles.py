"""Decoding a latent frame in strips, one after another: a share of the memory, for some pixels computed twice.

What works at the latents' own resolution takes a 64th of the pixels and looks over the whole frame: it is never cut.
Behind it come convolutions alone. A strip is decoded with a margin of its neighbours that is as wide as all of them
look together, and cut back afterwards: the frames are those of the whole, but for the rounding of convolutions that
add in another order in another shape.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lowvram_models.vae_layers import Slot

MARGIN = 7
"""Latents. From the first upsampling on a pixel depends on so many to either side: each resolution has a convolution
behind the upsampling and three blocks of two (7 pixels at 2, 4 and 8 times the latents' resolution), and one more makes
the picture: 7 / 2 + 7 / 4 + 8 / 8 = 6.25."""


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
    run: Callable[[Tensor, list[Slot]], Tensor], x: Tensor, slots: list[Slot], count: int
) -> tuple[Tensor, list[Slot]]:
    """``run(x, slots) -> frames``, which replaces ``slots``, on strips along the longer side of x [B, C, T, h, w].

    Returns the frames [B, 3, T', 8 h, 8 w] and the slots that running on the whole would have left.
    """
    side = 3 if x.shape[3] > x.shape[4] else 4
    length = x.shape[side]
    frames: Tensor | None = None
    kept: list[Slot] = [None] * len(slots)
    for strip in strips(length, count):
        own: list[Slot] = [_cut(slot, side, length, strip.begin, strip.end) for slot in slots]
        part = run(x.narrow(side, strip.begin, strip.end - strip.begin), own)
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
        whole = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=torch.channels_last_3d)
    width = (strip.last - strip.first) * scale
    inner = part.narrow(side, (strip.first - strip.begin) * scale, width)
    whole.narrow(side, strip.first * scale, width).copy_(inner)
    return whole
