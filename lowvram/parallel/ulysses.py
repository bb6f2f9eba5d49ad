"""Sequence parallelism: tokens are shared among ranks, and around self-attention they are exchanged for heads.

Every rank computes norms, Linears and cross-attention for its tokens with whole weights; in self-attention it has all
tokens of its heads, and so its part of rings and sink. Nothing is padded: shares of tokens and heads may be uneven.
Source: DeepSpeed-Ulysses (arXiv 2309.14509). Shapes: L tokens of a call, in ``groups`` equal groups
(latent frames), l this rank's; N heads, n this rank's; H head_dim; p a rank's place in its group.

A rank has a share of *each* group of tokens (latent frame): so audio, which speaks to latent frames, still finds them
as equal groups. Behind the exchange tokens stand rank by rank, each rank's in its order. Attention does not mind: to
it keys have no order, and the rows of queries go back the way they came.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch

from lowvram.planning.rank_layout import shares, span
from lowvram_models.attention import AttentionMemory, Heads
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


class Pending(Protocol):
    def wait(self) -> Tensor:
        """What has been received; what is computed from here on sees it."""
        ...


class AllToAll(Protocol):
    """The exchange that a group's ranks do together, in the same order."""

    def begin(self, flat: Tensor, sent: list[int], received: list[int]) -> Pending:
        """Send ``flat``, [values] in a stretch for each rank of the group in turn, each so many values long, and
        receive a stretch of each, so many values long."""
        ...


class Ulysses:
    """The ``index``-th of ``size`` ranks that share tokens and heads."""

    def __init__(self, index: int, size: int, all_to_all: AllToAll):
        self.index, self.size, self._all_to_all = index, size, all_to_all
        # Exchanges of the piece of work that is under way, and how many of the next ones are left out.
        self._made = self._left_out = 0

    def heads(self, count: int) -> int:
        return shares(count, self.size)[self.index]

    def own(self, x: Tensor, groups: int) -> Tensor:
        of_group = x.unflatten(0, (groups, -1))
        mine = span(of_group.shape[1], self.size, self.index)
        # A copy: a part of a larger tensor would keep all of it in memory.
        own = of_group[:, mine.start : mine.stop].clone(memory_format=torch.contiguous_format)
        return own.flatten(0, 1)

    def whole(self, own: Tensor, total: int, groups: int) -> Tensor:
        counts = self.tokens(total, groups)
        width = own.shape[1:].numel()
        flat = own.reshape(-1).repeat(self.size)
        stretches = [count * width for count in counts]
        received = self._begin(flat, [own.numel()] * self.size, stretches).wait()
        parts = [part.view(groups, -1, *own.shape[1:]) for part in received.split(stretches)]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def around(self, memory: AttentionMemory, rope: Rope, groups: int) -> AttentionMemory:
        return UlyssesMemory(self, memory, rope, len(rope.cos), groups)

    def begin_to_heads(self, x_lNH: Tensor, tokens: list[int]) -> Exchange:
        """Own tokens and all heads [l, N, H] -> all tokens and own heads [L, n, H]; ``tokens`` are each rank's."""
        own, count, width = x_lNH.shape
        heads = shares(count, self.size)
        # Cut by heads, each rank's stretch has to lie in one piece: this is the one copy on the way.
        flat = torch.cat([part.reshape(-1) for part in x_lNH.split(heads, dim=1)])
        mine = heads[self.index]
        pending = self._begin(flat, [own * each * width for each in heads], [each * mine * width for each in tokens])
        return Exchange(pending, (sum(tokens), mine, width))

    def to_tokens(self, x_LnH: Tensor, tokens: list[int], heads: int) -> Tensor:
        """All tokens and own heads [L, n, H] -> own tokens and all heads [l, N, H]."""
        mine, width, own = x_LnH.shape[1], x_LnH.shape[2], tokens[self.index]
        each = shares(heads, self.size)
        received = self._begin(
            x_LnH.reshape(-1), [count * mine * width for count in tokens], [own * count * width for count in each]
        ).wait()
        parts = received.split([own * count * width for count in each])
        return torch.cat([part.view(own, -1, width) for part in parts], dim=1)

    def begins(self) -> None:
        self._made = 0

    @contextlib.contextmanager
    def catching_up(self) -> Iterator[None]:
        self._left_out = self._made
        try:
            yield
        finally:
            self._left_out = 0

    def attend_nothing(self, like_NH: Tensor, total: int, groups: int) -> None:
        """As much as ``UlyssesMemory.attend`` exchanges: queries, keys and values to heads, what was attended back."""
        tokens, (heads, width) = self.tokens(total, groups), like_NH.shape
        own = like_NH.new_zeros(tokens[self.index], heads, width)
        for _ in range(3):
            of_heads = self.begin_to_heads(own, tokens).wait()
        self.to_tokens(of_heads, tokens, heads)

    def _begin(self, flat: Tensor, sent: list[int], received: list[int]) -> Pending:
        if self._left_out:
            self._left_out -= 1
            return _There(flat.new_zeros(sum(received)))
        pending = self._all_to_all.begin(flat, sent, received)
        self._made += 1
        return pending

    def tokens(self, total: int, groups: int) -> list[int]:
        """Each rank's tokens of ``total`` in ``groups`` equal groups."""
        return [groups * share for share in shares(total // groups, self.size)]


@dataclasses.dataclass(frozen=True)
class _There:
    """What nobody had to be waited for."""

    value: Tensor

    def wait(self) -> Tensor:
        return self.value


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One exchange under way."""

    pending: Pending
    shape: tuple[int, int, int]

    def wait(self) -> Tensor:
        return self.pending.wait().view(self.shape)


@dataclasses.dataclass(frozen=True)
class UlyssesMemory:
    """Gives ``memory`` all tokens of this rank's heads, and its caller what was attended for this rank's tokens."""

    ulysses: Ulysses
    memory: AttentionMemory
    rope: Rope
    total: int
    groups: int

    def attend(self, queries: Heads, keys: Heads, v_LNH: Tensor, rope: Rope) -> Tensor:
        """Of this rank's tokens; ``rope`` is theirs."""
        ulysses, heads = self.ulysses, v_LNH.shape[1]
        tokens = ulysses.tokens(self.total, self.groups)
        # Queries and values are on their way while the keys are normalised.
        sent, values = (ulysses.begin_to_heads(x, tokens) for x in (queries(rope), v_LNH))

        def all_keys(wanted: Rope | None) -> Tensor:
            return ulysses.begin_to_heads(keys(None if wanted is None else rope), tokens).wait()

        q_LnH = sent.wait()
        attended = self.memory.attend(lambda _: q_LnH, all_keys, values.wait(), self.rope)
        return ulysses.to_tokens(attended, tokens, heads)
