"""Latents on their way through the stages: each takes its denoising steps and passes on; the last one's are finished.

Ranks with the same place in their stages make up a chain of their own: every rank of a stage has whole latents.
Shapes: C latent channels, F latent frames, h x w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch

from lowvram.parallel.comm import Comm, Received
from lowvram.planning.rank_layout import ParallelLayout, Role
from lowvram.schedule import Block
from lowvram_models.constants import LATENT_CHANNELS

Tensor = torch.Tensor
Waiting = Callable[[str], AbstractContextManager[None]]
"""Says what this rank waits for while the context is entered."""
_REFERENCE = 0  # the tag of the first latent frame; blocks have 1 and more


class StageChain:
    """One rank's neighbours. ``blocks`` are all of the video, in order; with more than one clip the last stage tells
    the others the first latent frame, which the second clip's sink is made from."""

    def __init__(
        self,
        comm: Comm,
        layout: ParallelLayout,
        role: Role,
        blocks: Iterable[Block],
        latent_size: tuple[int, int],
        *,
        clips: int,
        waiting: Waiting,
    ):
        if role.stage is None or role.index is None:
            raise ValueError(f"{role.name} denoises nothing; expected a rank of a stage")
        self._comm, self._layout, self._latent_size, self._clips = comm, layout, latent_size, clips
        self._waiting = waiting
        self._stage, self._index = role.stage, role.index
        self._last = layout.stages - 1
        self._reference: Tensor | None = None
        self._arriving: Iterator[tuple[Block, Tensor]] | None = None
        if role.stage > 0:
            self._arriving = _ahead(comm, self._rank(role.stage - 1), blocks, latent_size, waiting)

    def take(self, block: Block) -> Tensor | None:
        if self._arriving is None:
            return None
        arrived, latent = next(self._arriving)
        if arrived != block:
            raise RuntimeError(f"block {arrived.index} was on its way; expected block {block.index}")
        return latent

    def pass_on(self, block: Block, latent_CFhw: Tensor) -> None:
        if self._stage < self._last:
            self._comm.send(latent_CFhw, self._rank(self._stage + 1), _tag(block))
            return
        if block.index == 0 and self._clips > 1:
            self._reference = latent_CFhw[:, :1]
            for stage in range(self._last):
                self._comm.send(self._reference, self._rank(stage), _REFERENCE)
        if self._layout.vae_rank and self._index == 0:
            self._comm.send(latent_CFhw, self._layout.media_rank, _tag(block))

    def reference(self) -> Tensor:
        if self._reference is None:
            shape = (LATENT_CHANNELS, 1, *self._latent_size)
            coming = self._comm.expect(shape, self._rank(self._last), _REFERENCE)
            with self._waiting("the first latent frame"):
                self._reference = coming.wait()
        return self._reference

    def _rank(self, stage: int) -> int:
        return self._layout.members(stage)[self._index]


def arriving(
    comm: Comm, layout: ParallelLayout, blocks: Iterable[Block], latent_size: tuple[int, int], waiting: Waiting
) -> Iterator[tuple[Block, Tensor]]:
    """Finished blocks as they reach the VAE's rank."""
    return _ahead(comm, layout.members(layout.stages - 1)[0], blocks, latent_size, waiting)


def _ahead(
    comm: Comm, sender: int, blocks: Iterable[Block], latent_size: tuple[int, int], waiting: Waiting
) -> Iterator[tuple[Block, Tensor]]:
    """Receive each block's latent; the next is on its way while one is worked on."""

    def arrived(block: Block, coming: Received) -> tuple[Block, Tensor]:
        with waiting(f"block {block.index} from rank {sender}"):
            return block, coming.wait()

    last = None
    for block in blocks:
        coming = comm.expect((LATENT_CHANNELS, block.frames, *latent_size), sender, _tag(block))
        if last is not None:
            yield arrived(*last)
        last = block, coming
    if last is not None:
        yield arrived(*last)


def _tag(block: Block) -> int:
    return block.index + 1
