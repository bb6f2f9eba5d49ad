"""KV formats: how keys and values of a block lie in memory and attention reads them, as they are, or in 8 bit.

A block of n tokens is one stretch of bytes, so that it crosses PCIe in one copy. Shapes: L tokens, N heads,
H head_dim.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from lowvram.loading.fused_block import ProjectedHeads
from lowvram_kernels.attention import attention
from lowvram_kernels.projected import Projected, TurnedSink, attend_projected
from lowvram_kernels.ring_attention import ring_and_sink_attention
from lowvram_kernels.ring_codec import KVBlock, SlotLayout, decode_block, encode_block, room_for_keys
from lowvram_models.attention import Heads
from lowvram_models.rope import Rope, apply_rope

Tensor = torch.Tensor
Bytes = tuple[Tensor, int]
"""A block's bytes, uint8, and its tokens."""


@dataclasses.dataclass(frozen=True)
class Own:
    """A block's queries and keys, to be rotated by ``rope``, and values [L, N, H]."""

    queries: Heads
    keys: Heads
    v_LNH: Tensor
    rope: Rope


class KVFormat(Protocol):
    def nbytes(self, tokens: int) -> int:
        """Bytes of a block of that many tokens."""
        ...

    def write(self, block: Tensor, k_LNH: Tensor, v_LNH: Tensor) -> None:
        """Write keys and values into ``block``, uint8 with at least ``nbytes(L)`` bytes."""
        ...

    def read(self, block: Tensor, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [L, N, H] as attention sees them."""
        ...

    def attend(
        self,
        own: Own,
        slot: int,
        blocks: Sequence[Bytes],
        sink: Bytes,
        sink_rope: Rope,
        rotated: KVBlock | None = None,
    ) -> Tensor:
        """Write keys and values into ``blocks[slot]``; then the queries attend to the blocks of a ring and to the sink,
        whose keys are rotated now: [L, N, H]. ``rotated`` is what ``room_for_keys`` gave."""
        ...

    def room_for_keys(self, sink: Bytes) -> KVBlock | None:
        """Where rotated keys of such a sink can stand at one address from call to call; None where that is no use."""
        ...


Made = TypeVar("Made")


class _Views(Generic[Made]):
    """What ``make`` gives for a block's bytes, kept for as long as that very tensor lives: its views are many, and the
    slots of rings come round in every step."""

    def __init__(self, make: Callable[[Tensor, int], Made]):
        self._make = make
        self._kept: dict[tuple[int, int], tuple[weakref.ref[Tensor], Made]] = {}

    def of(self, block: Tensor, tokens: int) -> Made:
        key = (id(block), tokens)
        found = self._kept.get(key)
        if found is not None and found[0]() is block:
            return found[1]
        made = self._make(block, tokens)
        self._kept[key] = (weakref.ref(block, lambda _: self._kept.pop(key, None)), made)
        return made


class PlainFormat:
    """Keys [n, N, H], then values [n, N, H], in ``dtype``. For attention they are laid out behind each other."""

    def __init__(self, heads: int, head_dim: int, dtype: torch.dtype):
        self._shape, self._dtype = (heads, head_dim), dtype
        self._views = _Views(self._made)

    def nbytes(self, tokens: int) -> int:
        return 2 * tokens * math.prod(self._shape) * self._dtype.itemsize

    def write(self, block: Tensor, k_LNH: Tensor, v_LNH: Tensor) -> None:
        for part, values in zip(self._parts(block, len(k_LNH)), (k_LNH, v_LNH), strict=True):
            part.copy_(values)

    def read(self, block: Tensor, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k, v = self._parts(block, tokens)
        return k.to(dtype), v.to(dtype)

    def attend(
        self,
        own: Own,
        slot: int,
        blocks: Sequence[Bytes],
        sink: Bytes,
        sink_rope: Rope,
        rotated: KVBlock | None = None,
    ) -> Tensor:
        q_LNH = own.queries(own.rope)  # before keys and values are laid out: what norms take is gone by then
        self.write(blocks[slot][0], own.keys(own.rope), own.v_LNH)
        parts = [self._parts(*block) for block in blocks]
        sink_k, sink_v = self._parts(*sink)
        keys = torch.cat([*(k for k, _ in parts), apply_rope(sink_k, sink_rope)])
        values = torch.cat([*(v for _, v in parts), sink_v])
        return attention(q_LNH, keys, values)

    def room_for_keys(self, sink: Bytes) -> None:
        return None

    def _parts(self, block: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        return self._views.of(block, tokens)

    def _made(self, block: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        k, v = block[: self.nbytes(tokens)].view(self._dtype).view(2, tokens, *self._shape)
        return k, v


class Int8Format:
    """The kernels' own: see ``lowvram_kernels.ring_codec``."""

    def __init__(self, heads: int, head_dim: int):
        self._heads, self._head_dim = heads, head_dim
        self._views = _Views(self._made)

    def nbytes(self, tokens: int) -> int:
        return self._layout(tokens).nbytes

    def write(self, block: Tensor, k_LNH: Tensor, v_LNH: Tensor) -> None:
        encode_block(k_LNH, v_LNH, self._views.of(block, len(k_LNH)))

    def read(self, block: Tensor, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return decode_block(self._views.of(block, tokens), dtype)

    def attend(
        self,
        own: Own,
        slot: int,
        blocks: Sequence[Bytes],
        sink: Bytes,
        sink_rope: Rope,
        rotated: KVBlock | None = None,
    ) -> Tensor:
        *encoded, last = [self._views.of(*block) for block in (*blocks, sink)]
        turned = TurnedSink(last, sink_rope.cos, sink_rope.sin, rotated)
        if isinstance(own.queries, ProjectedHeads) and isinstance(own.keys, ProjectedHeads):
            projections = (own.queries.projection, own.keys.projection)
            projected = Projected(*projections, own.v_LNH, own.rope.cos, own.rope.sin)
            return attend_projected(projected, slot, encoded, turned)
        encode_block(own.keys(own.rope), own.v_LNH, encoded[slot])
        return ring_and_sink_attention(
            own.queries(own.rope), encoded, last, sink_rope.cos, sink_rope.sin, rotated=rotated
        )

    def room_for_keys(self, sink: Bytes) -> KVBlock:
        return room_for_keys(self._views.of(*sink))

    def _layout(self, tokens: int) -> SlotLayout:
        return SlotLayout(tokens=tokens, heads=self._heads, head_dim=self._head_dim)

    def _made(self, block: Tensor, tokens: int) -> KVBlock:
        return self._layout(tokens).block(block)


def kv_format(scheme: str, heads: int, head_dim: int, dtype: torch.dtype) -> KVFormat:
    """``scheme`` "plain" or "int8"; ``dtype`` is what is computed in."""
    return Int8Format(heads, head_dim) if scheme == "int8" else PlainFormat(heads, head_dim, dtype)
