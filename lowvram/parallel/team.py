"""Team: the other ranks of a run, and the denoising steps before and behind a rank's own, as it needs them; here of a
run that has one rank.

Shapes: C latent channels, F latent frames, h x w latent size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch

from lowvram.encode.conditions import Conditions
from lowvram.offload.layers import Shared
from lowvram.parallel.ulysses import Sequence, Whole
from lowvram.planning.rank_layout import ParallelLayout, Role
from lowvram.schedule import Block

Tensor = torch.Tensor


class Chain(Protocol):
    def take(self, block: Block) -> Tensor | None:
        """A block's latent [C, F, h, w] from the steps before; None where its first step is to run here."""
        ...

    def pass_on(self, block: Block, latent_CFhw: Tensor) -> None:
        """A block has taken its last step here."""
        ...

    def reference(self) -> Tensor:
        """The first latent frame [C, 1, h, w] of the video, once it has taken all steps."""
        ...


class Alone:
    """All steps run here. ``reference`` is the first latent frame where another process has made it."""

    def __init__(self, reference: Tensor | None = None) -> None:
        self._reference = reference

    def take(self, block: Block) -> Tensor | None:
        return None

    def pass_on(self, block: Block, latent_CFhw: Tensor) -> None:
        if block.index == 0:
            self._reference = latent_CFhw[:, :1]

    def reference(self) -> Tensor:
        if self._reference is None:
            raise RuntimeError("the first block is not finished; expected it to be before the second clip starts")
        return self._reference


LatentSize = tuple[int, int]


class Team(Protocol):
    """``layout`` says what each rank does, ``role`` what this one does, ``sequence`` its part of tokens and heads;
    ``host_weights`` is where streamed layers lie once for all ranks of a machine."""

    layout: ParallelLayout
    role: Role
    sequence: Sequence
    host_weights: Shared | None

    def share(self, what: str, value: Any) -> list[Any]:
        """Every rank tells ``value``, of which JSON has to be able; all ranks' values in order."""
        ...

    def share_conditions(self, conditions: Conditions | None) -> Conditions:
        """The media rank tells what it encoded, the others pass None and are told."""
        ...

    def chain(self, blocks: Iterable[Block], latent_size: LatentSize, *, clips: int) -> Chain:
        """Where the latents of ``blocks`` come from and go to; for ranks that denoise."""
        ...

    def arriving(self, blocks: Iterable[Block], latent_size: LatentSize) -> Iterator[tuple[Block, Tensor]]:
        """The finished latents [C, F, h, w] of ``blocks``, as they come in; for the VAE's own rank."""
        ...

    def doing(self, what: str, kind: str) -> contextlib.AbstractContextManager[None]:
        """Say what this rank does while the context is entered; pieces of work of one ``kind`` take about as long."""
        ...

    def sent_bytes(self) -> dict[str, int]:
        """Bytes sent to other ranks so far, by what they were for."""
        ...

    def meet(self) -> None:
        """Wait for the ranks that share this one's tokens and heads, before work that they do together."""
        ...

    def any_ran_out(self, here: bool) -> bool:
        """Whether memory ran out on one of these ranks in what they did together; each tells whether ``here``."""
        ...


class SingleRank:
    """One rank does everything."""

    def __init__(self) -> None:
        self.layout = ParallelLayout()
        self.role = self.layout.role(0)
        self.sequence: Sequence = Whole()
        self.host_weights: Shared | None = None

    def share(self, what: str, value: Any) -> list[Any]:
        return [value]

    def share_conditions(self, conditions: Conditions | None) -> Conditions:
        if conditions is None:
            raise RuntimeError("there is no other rank to be told by; expected conditions")
        return conditions

    def chain(self, blocks: Iterable[Block], latent_size: LatentSize, *, clips: int) -> Chain:
        return Alone()

    def arriving(self, blocks: Iterable[Block], latent_size: LatentSize) -> Iterator[tuple[Block, Tensor]]:
        raise RuntimeError("no latents arrive where one rank does everything; expected it to denoise")

    def doing(self, what: str, kind: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def sent_bytes(self) -> dict[str, int]:
        return {}

    def meet(self) -> None:
        """There is nobody to wait for."""

    def any_ran_out(self, here: bool) -> bool:
        return here
