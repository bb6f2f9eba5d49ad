"""One rank without the others, for a dry run: what they would send has the right shapes and no values.

Shapes: C latent channels, F latent frames, h x w latent size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from lowvram.encode.conditions import Conditions
from lowvram.offload.layers import Shared
from lowvram.parallel.team import Chain, LatentSize
from lowvram.parallel.ulysses import Sequence, Ulysses, Whole
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.schedule import Block
from lowvram_models.constants import LATENT_CHANNELS

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class _Received:
    value: Tensor
    sent: Tensor  # stays until it is sent

    def wait(self) -> Tensor:
        return self.value


class PretendExchange:
    """Takes the memory that an exchange takes, and counts the bytes that would leave this rank."""

    def __init__(self, index: int):
        self._index, self.sent_bytes = index, 0

    def begin(self, flat: Tensor, sent: list[int], received: list[int]) -> _Received:
        self.sent_bytes += (sum(sent) - sent[self._index]) * flat.element_size()
        return _Received(flat.new_empty(sum(received)), flat)


class PretendTeam:
    """Rank ``rank`` of ``layout``; ``conditions`` are what the media rank would tell."""

    def __init__(self, layout: ParallelLayout, rank: int, latent_size: LatentSize, conditions: Conditions):
        self.layout, self.role = layout, layout.role(rank)
        self._latent_size, self._conditions = latent_size, conditions
        self.host_weights: Shared | None = None
        self.exchange = PretendExchange(self.role.index or 0)
        alone = self.role.index is None or layout.ulysses_size == 1
        index = self.role.index or 0
        self.sequence: Sequence = Whole() if alone else Ulysses(index, layout.ulysses_size, self.exchange)

    def share(self, what: str, value: Any) -> list[Any]:
        told = self._latent_size if what == "latent_size" else value
        return [told] * self.layout.world_size

    def share_conditions(self, conditions: Conditions | None) -> Conditions:
        return conditions or self._conditions

    def chain(self, blocks: Iterable[Block], latent_size: LatentSize, *, clips: int) -> Chain:
        return _PretendChain(first=self.role.stage == 0, latent_size=latent_size)

    def arriving(self, blocks: Iterable[Block], latent_size: LatentSize) -> Iterator[tuple[Block, Tensor]]:
        return ((block, _latent(block.frames, latent_size)) for block in blocks)

    def doing(self, what: str, kind: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def sent_bytes(self) -> dict[str, int]:
        return {"exchange": self.exchange.sent_bytes}

    def meet(self) -> None:
        """Nobody else is here."""

    def any_ran_out(self, here: bool) -> bool:
        return here


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PretendChain:
    first: bool
    latent_size: LatentSize

    def take(self, block: Block) -> Tensor | None:
        return None if self.first else _latent(block.frames, self.latent_size)

    def pass_on(self, block: Block, latent_CFhw: Tensor) -> None:
        """It would be copied to the host and sent from there."""
        latent_CFhw.to("cpu")

    def reference(self) -> Tensor:
        return _latent(1, self.latent_size)


def _latent(frames: int, latent_size: LatentSize) -> Tensor:
    return torch.zeros(LATENT_CHANNELS, frames, *latent_size)
