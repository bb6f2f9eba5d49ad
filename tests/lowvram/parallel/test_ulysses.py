"""Tokens shared and exchanged for heads, by ranks that are threads of one process.

Shapes: L tokens of a call, l a rank's; N heads, n a rank's; H head_dim; T tokens of a group.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from lowvram.denoise.kv_cache import RingMemory, Rings, RingShape, Sink, Window
from lowvram.denoise.kv_format import kv_format
from lowvram.offload.copy_engine import engine_for
from lowvram.parallel.ulysses import Ulysses, own_rope
from lowvram.planning.rank_layout import shares
from lowvram_models.rope import Rope, apply_rope

Tensor = torch.Tensor
CPU = torch.device("cpu")


class Room:
    """Where ``size`` threads lay out what they send, and fetch what is for them."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=20)
        self.stretches: dict[tuple[int, int, int], Tensor] = {}
        """By call, sender and receiver."""


class InRoom:
    """``AllToAll`` of one of the threads."""

    def __init__(self, room: Room, index: int):
        self._room, self._index, self._calls = room, index, itertools.count()
        self.sent: list[list[int]] = []

    def begin(self, flat: Tensor, sent: list[int], received: list[int]) -> Any:
        assert flat.ndim == 1
        call, room = next(self._calls), self._room
        self.sent.append(sent)
        for receiver, stretch in enumerate(flat.split(sent)):
            room.stretches[call, self._index, receiver] = stretch.clone()
        room.barrier.wait()
        mine = [room.stretches[call, sender, self._index] for sender in range(len(sent))]
        assert [len(stretch) for stretch in mine] == received
        return Arrived(torch.cat(mine))


@dataclasses.dataclass(frozen=True)
class Arrived:
    value: Tensor

    def wait(self) -> Tensor:
        return self.value


def together(size: int, part: Callable[[Ulysses], Any]) -> list[Any]:
    """What ``part`` gives on each of so many ranks."""
    room = Room(size)

    def one(index: int) -> Any:
        try:
            return part(Ulysses(index, size, InRoom(room, index)))
        except BaseException:
            room.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(one, range(size)))


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# tokens a group, groups, heads, ranks
SHAPES = [(1125, 3, 40, 2), (22, 1, 5, 3), (7, 3, 40, 3), (5, 2, 5, 4), (4, 3, 4, 4), (6, 2, 5, 1)]


@pytest.mark.parametrize(("tokens", "groups", "heads", "size"), SHAPES)
def test_whole_is_the_inverse_of_own(tokens, groups, heads, size):
    x = drawn(tokens * groups, 4)
    parts = together(size, lambda ulysses: ulysses.own(x, groups))
    assert [len(part) for part in parts] == [groups * share for share in shares(tokens, size)]
    assert torch.equal(parts[-1][-1], x[-1])
    wholes = together(size, lambda ulysses: ulysses.whole(ulysses.own(x, groups), tokens * groups, groups))
    assert all(torch.equal(whole, x) for whole in wholes)


def test_own_is_a_share_of_each_group_in_a_memory_of_its_own():
    x = torch.arange(2 * 5).view(10, 1)
    parts = together(2, lambda ulysses: ulysses.own(x, 2))
    assert [part.flatten().tolist() for part in parts] == [[0, 1, 2, 5, 6, 7], [3, 4, 8, 9]]
    assert parts[0].untyped_storage().nbytes() == parts[0].nbytes


@pytest.mark.parametrize(("tokens", "groups", "heads", "size"), SHAPES)
def test_to_heads_and_back(tokens, groups, heads, size):
    x = drawn(tokens * groups, heads, 2)

    def there_and_back(ulysses: Ulysses) -> tuple[Tensor, Tensor, Tensor]:
        own, each = ulysses.own(x, groups), ulysses.tokens(tokens * groups, groups)
        of_heads = ulysses.begin_to_heads(own, each).wait()
        return own, of_heads, ulysses.to_tokens(of_heads, each, heads)

    found = together(size, there_and_back)
    # Rank by rank, each rank's tokens in their order: the same for all heads.
    by_rank = torch.cat([own for own, _, _ in found])
    assert torch.equal(torch.cat([of_heads for _, of_heads, _ in found], dim=1), by_rank)
    assert [of_heads.shape[1] for _, of_heads, _ in found] == list(shares(heads, size))
    assert all(torch.equal(back, own) for own, _, back in found)


def test_nothing_is_padded():
    tokens, groups, heads, size, width = 1125, 3, 40, 3, 2
    x = drawn(tokens * groups, heads, width)

    def sent(ulysses: Ulysses) -> list[int]:
        own, each = ulysses.own(x, groups), ulysses.tokens(tokens * groups, groups)
        ulysses.to_tokens(ulysses.begin_to_heads(own, each).wait(), each, heads)
        return [sum(stretches) for stretches in ulysses._all_to_all.sent]

    assert [sum(calls) for calls in zip(*together(size, sent), strict=True)] == [x.numel()] * 2


@pytest.mark.parametrize("fails_at", range(5), ids=["queries", "values", "keys", "back", "whole"])
@pytest.mark.parametrize(("tokens", "groups", "heads", "size"), [(7, 3, 40, 3), (5, 2, 5, 2)])
def test_a_rank_that_fails_catches_up_with_the_others(tokens, groups, heads, size, fails_at):
    """Wherever it stops, it exchanges with zeros what is left of the piece of work, and the next one begins in step."""
    x = drawn(tokens * groups, heads, 2, dtype=torch.float32)
    rope = a_rope(tokens * groups, 2, seed=1, dtype=torch.float32)

    def work(ulysses: Ulysses) -> Tensor:
        ulysses.begins()
        own = ulysses.own(x, groups)
        memory = ulysses.around(PlainMemory(), rope, groups)
        y = memory.attend(lambda _: own, lambda _: own, own, own_rope(ulysses, rope, groups))
        return ulysses.whole(y.flatten(1).float(), tokens * groups, groups)

    def part(ulysses: Ulysses) -> Tensor:
        real, calls = ulysses._all_to_all.begin, itertools.count()

        def begin(*args: Any) -> Any:
            if ulysses.index == 1 and next(calls) == fails_at:
                raise MemoryError
            return real(*args)

        ulysses._all_to_all.begin = begin
        try:
            work(ulysses)
        except MemoryError:
            ulysses._all_to_all.begin = real
            with ulysses.catching_up():
                ulysses.attend_nothing(x[0], tokens * groups, groups)
                ulysses.whole(ulysses.own(x.flatten(1), groups), tokens * groups, groups)
        return work(ulysses)

    first, *others = together(size, part)
    assert all(torch.equal(first, other) for other in others)
    assert first.isfinite().all()


@dataclasses.dataclass
class PlainMemory:
    """Attention in float64 among the call's own tokens."""

    def attend(self, queries: Any, keys: Any, v_LNH: Tensor, rope: Rope) -> Tensor:
        q, k, v = (t.transpose(0, 1) for t in (queries(rope), keys(rope), v_LNH))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        return (scores.softmax(-1) @ v).transpose(0, 1)


def a_rope(tokens: int, head_dim: int, seed: int, dtype: torch.dtype = torch.float64) -> Rope:
    angles = drawn(tokens, head_dim // 2, seed=seed, dtype=dtype)
    return Rope(angles.cos(), angles.sin())


def attended(memory: Any, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
    """As a DiT block calls a memory: queries and keys are rotated on demand."""

    def heads(x: Tensor) -> Any:
        return lambda wanted: x if wanted is None else apply_rope(x, wanted)

    return memory.attend(heads(q), heads(k), v, rope)


@pytest.mark.parametrize(("tokens", "groups", "heads", "size"), [(35, 3, 40, 3), (9, 2, 5, 4), (11, 3, 5, 2)])
def test_attention_is_plain_attention(tokens, groups, heads, size):
    total = tokens * groups
    q, k, v = (drawn(total, heads, 8, seed=seed) for seed in range(3))
    rope = a_rope(total, 8, 3)
    plain = attended(PlainMemory(), q, k, v, rope)

    def part(ulysses: Ulysses) -> Tensor:
        mine = [ulysses.own(x, groups) for x in (q, k, v)]
        found = attended(ulysses.around(PlainMemory(), rope, groups), *mine, own_rope(ulysses, rope, groups))
        return ulysses.whole(found, total, groups)

    for found in together(size, part):
        assert (found - plain).abs().max() < 1e-12


@pytest.mark.parametrize("kv", ["plain", "int8"])
def test_rings_and_sink_hold_the_same_of_each_head(kv):
    """Two blocks of two frames, five heads over three ranks: codes, scales and means of a head are those of the whole
    ring, with its tokens in another order; what is attended is the same."""
    tokens, groups, heads, size, width, sink_tokens = 7, 2, 5, 3, 8, 10
    blocks = [_exact(tokens * groups, heads, width, seed) for seed in (0, 10)]
    condition = _exact(sink_tokens, heads, width, 20)
    ropes = [_quarter_turns(tokens * groups, width, seed) for seed in (1, 2)]
    sink_rope, first = (_quarter_turns(sink_tokens, width, seed) for seed in (3, 4))

    def run(sequence: Any) -> tuple[list[Tensor], Any, Any]:
        share = sequence.heads(heads) if sequence else heads
        kind = kv_format(kv, share, width, torch.float32)
        rings = Rings(RingShape(slots=(tokens * groups,) * 2), kind, engine_for(CPU), range(1), 1)
        rings.place((), 2)
        sink = Sink(kind, 1, sink_tokens, CPU)
        own = (lambda x, count: sequence.own(x, count)) if sequence else (lambda x, count: x)
        around = (lambda m, r, count: sequence.around(m, r, count)) if sequence else (lambda m, r, count: m)
        rope_of = (lambda r, count: own_rope(sequence, r, count)) if sequence else (lambda r, count: r)
        attended(around(sink.recorder(0), first, 1), *(own(x, 1) for x in condition), rope_of(first, 1))
        found = []
        for slot, (block, rope) in enumerate(zip(blocks, ropes, strict=True)):
            memory = RingMemory(rings, sink, (0, 0), Window(slot, slot + 1), sink_rope)
            mine = [own(x, groups) for x in block]
            y = attended(around(memory, rope, groups), *mine, rope_of(rope, groups))
            found.append(sequence.whole(y, tokens * groups, groups) if sequence else y)
        return found, rings.snapshot(0, 0, torch.float32), sink.read(0, torch.float32)

    one, (k_one, v_one), sink_one = run(None)
    ranks = together(size, run)
    order = torch.cat(together(size, lambda ulysses: ulysses.own(torch.arange(tokens * groups), groups)))
    both = torch.cat([order, order + tokens * groups])
    for index, whole in enumerate((k_one, v_one)):
        assert torch.equal(torch.cat([ring[index] for _, ring, _ in ranks], dim=1), whole[both])
        assert torch.equal(torch.cat([sink[index] for *_, sink in ranks], dim=1), sink_one[index])
    for found, *_ in ranks:
        assert all((a - b).norm() / b.norm() < 1e-6 for a, b in zip(found, one, strict=True))


def _exact(tokens: int, heads: int, width: int, seed: int) -> list[Tensor]:
    """Queries, keys and values whose sums are exact in float32, in any order: so means of keys have the same bits."""
    return [(drawn(tokens, heads, width, seed=seed + i, dtype=torch.float32) * 64).round() / 64 for i in range(3)]


def _quarter_turns(tokens: int, head_dim: int, seed: int) -> Rope:
    """Rotations that keep what is exact exact."""
    turns = torch.randint(4, (tokens, head_dim // 2), generator=torch.Generator().manual_seed(seed))
    cos, sin = torch.tensor([1.0, 0.0, -1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, -1.0])
    return Rope(cos[turns], sin[turns])
