"""Sequence of a call's tokens, and heads of its self-attention, as ranks share them; here: not at all.

Shapes: L tokens of a call, in ``groups`` equal groups (latent frames); l of them this rank's; N heads, n of them this
rank's; H head_dim.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch

from lowvram_models.attention import AttentionMemory
from lowvram_models.rope import Rope

Tensor = torch.Tensor


class Sequence(Protocol):
    def heads(self, count: int) -> int:
        """How many of ``count`` heads this rank attends with, and keeps keys and values of."""
        ...

    def own(self, x: Tensor, groups: int) -> Tensor:
        """This rank's tokens of [L, ...]: a share of each of ``groups`` equal groups."""
        ...

    def whole(self, own: Tensor, total: int, groups: int) -> Tensor:
        """All ranks' ``total`` tokens, [L, ...] in their order, from what ``own`` gave to each of them."""
        ...

    def around(self, memory: AttentionMemory, rope: Rope, groups: int) -> AttentionMemory:
        """A memory for this rank's tokens and all heads, from one for all tokens and this rank's heads. ``rope`` is
        that of all tokens."""
        ...

    def begins(self) -> None:
        """A piece of work begins, in which all ranks exchange as much with each other."""
        ...

    def catching_up(self) -> contextlib.AbstractContextManager[None]:
        """For a rank that could not finish a piece of work: what it has exchanged in it is left out inside, so that
        exchanging all of it again is exchanging the rest."""
        ...

    def attend_nothing(self, like_NH: Tensor, total: int, groups: int) -> None:
        """Exchange what ranks do around attention over ``total`` tokens, with zeros for heads [N, H] as ``like``."""
        ...


class Whole:
    """One rank has all tokens and all heads."""

    def heads(self, count: int) -> int:
        return count

    def own(self, x: Tensor, groups: int) -> Tensor:
        return x

    def whole(self, own: Tensor, total: int, groups: int) -> Tensor:
        return own

    def around(self, memory: AttentionMemory, rope: Rope, groups: int) -> AttentionMemory:
        return memory

    def begins(self) -> None:
        """Nobody waits."""

    def catching_up(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def attend_nothing(self, like_NH: Tensor, total: int, groups: int) -> None:
        """Nobody waits."""


def own_rope(sequence: Sequence, rope: Rope, groups: int) -> Rope:
    """The rotations of this rank's tokens."""
    return Rope(sequence.own(rope.cos, groups), sequence.own(rope.sin, groups))
