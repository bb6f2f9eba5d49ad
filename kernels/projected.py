"""Self-attention over 8-bit rings and sink from a layer's projections on, in one operation.

Norm and RoPE of queries and keys, the block's slot of the ring, the sink's rotated keys and the queries' 8 bits are
small passes over the same tokens that wait for each other at two points only. Order of preference: Triton on CUDA from
sm_80 on, in five launches, where queries and keys in wider numbers stand nowhere in memory; otherwise the parts, of
which each has backends of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from lowvram_kernels.choices import TRITON, choose
from lowvram_kernels.ring_attention import check_blocks, ring_and_sink_attention
from lowvram_kernels.ring_codec import KVBlock, encode_block
from lowvram_kernels.rope import Projection, check_norm_rope, norm_rope
from lowvram_kernels.trace import record

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Projected:
    """What the projections give for a block's T tokens: ``v`` [T, N, H]; ``cos`` and ``sin`` float32 [T, H / 2] rotate
    its queries and keys."""

    q: Projection
    k: Projection
    v_TNH: Tensor
    cos_TP: Tensor
    sin_TP: Tensor


@dataclasses.dataclass(frozen=True)
class TurnedSink:
    """A sink that is kept before RoPE, and the rotation of its S tokens now, float32 [S, H / 2]; ``room`` is for the
    rotated keys, where they are to stand at one address: see ``ring_codec.room_for_keys``."""

    block: KVBlock
    cos_TP: Tensor
    sin_TP: Tensor
    room: KVBlock | None = None


def attend_projected(own: Projected, slot: int, blocks: Sequence[KVBlock], sink: TurnedSink) -> Tensor:
    """Put keys and values into ``blocks[slot]``, then let the queries attend to all blocks and the sink: [T, N, H] in
    the dtype of the projections.

    With Triton keys are rounded once, to 8 bits, and queries too; the parts round both to the projections' dtype first.

    Raises:
        TypeError: the projections are not floating point, or a block is not encoded.
        ValueError: shapes or devices do not fit.
    """
    _check(own, slot, blocks, sink)
    device = own.k.x_TD.device
    if choose("attend_projected", device) == TRITON and choose("ring_attention", device) == TRITON:
        from lowvram_kernels.triton_projected import attend_projected_triton

        record("attend_projected", "int8: triton")
        record("ring_attention", "int8: triton")
        return attend_projected_triton(own, slot, blocks, sink)
    return attend_parts(own, slot, blocks, sink)


def attend_parts(own: Projected, slot: int, blocks: Sequence[KVBlock], sink: TurnedSink) -> Tensor:
    """The same by the operations that it is made of."""
    heads, table = own.v_TNH.shape[1], (own.cos_TP, own.sin_TP)
    keys = norm_rope(own.k.x_TD, own.k.weight_D, own.k.eps, heads, *table)
    encode_block(keys, own.v_TNH, blocks[slot])
    del keys
    queries = norm_rope(own.q.x_TD, own.q.weight_D, own.q.eps, heads, *table)
    return ring_and_sink_attention(queries, blocks, sink.block, sink.cos_TP, sink.sin_TP, rotated=sink.room)


def _check(own: Projected, slot: int, blocks: Sequence[KVBlock], sink: TurnedSink) -> None:
    block, v = blocks[slot], own.v_TNH
    for x in (own.q, own.k):
        if x.x_TD.shape != (block.tokens, block.k[0].numel()) or v.shape != block.k.shape:
            raise ValueError(
                f"a projection {tuple(x.x_TD.shape)} with v {tuple(v.shape)} for a block of {tuple(block.k.shape)}: "
                "expected [tokens, heads * head_dim] and the block's own shape"
            )
        check_norm_rope(x.x_TD, x.weight_D, v.shape[1], own.cos_TP, own.sin_TP)
    table = (sink.block.tokens, v.shape[2] // 2)
    if sink.cos_TP.shape != table or sink.sin_TP.shape != table:
        raise ValueError(
            f"cos {tuple(sink.cos_TP.shape)} and sin {tuple(sink.sin_TP.shape)} of the sink; expected {table}, a "
            "rotation for each token and pair of channels"
        )
    check_blocks(v[None], [[*blocks, sink.block]])
