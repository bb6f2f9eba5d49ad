"""Everything between a layer's projections and its attention over encoded blocks, in three passes and four launches.

A key is stored around the mean over its block's tokens, and a value in steps of its channel's largest, which have to be
known before the first of them: so keys are normed and rotated twice, values read twice, and in between only sums and
largest ones are written. Each launch does that for the block's own keys and for the sink's, which are kept before RoPE
and rotated anew at each reading; the last one makes the 8-bit queries too. Bytes a channel of K with bfloat16
projections: 2 and 4 / 12 for a sum of 12 tokens, that sum again, then 2 and the 1 that is stored: 5.7, and of V as
many; of the sink 1 twice, the sums, and 1: 3.7; of Q 2 and the 1 that attention reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lowvram_kernels.aot import Case
from lowvram_kernels.launch import launch
from lowvram_kernels.projected import Projected, TurnedSink
from lowvram_kernels.ring_codec import KVBlock, room_for_keys
from lowvram_kernels.triton_attention import Tile, attend_prepared
from lowvram_kernels.triton_means import means
from lowvram_kernels.triton_prepare import (
    OF_K,
    OF_K_MEAN,
    OF_K_SCALE,
    OF_V,
    OF_V_SCALE,
    OF_V_SUMS,
    Prepared,
    block_part,
    room_for,
    softmax_scale,
    spread,
)
from lowvram_kernels.triton_rope import block_shape, channel_mask, channel_offsets, encoded, normed_rope, rotated_key
from lowvram_kernels.triton_rows import magnitude_bits, packed, quantize_scales, row_warps, to_8bit
from lowvram_kernels.triton_values import store_tile

Tensor = torch.Tensor


@triton.jit
def _store_keys(
    value, token, origin, table, entry, ALIGNED: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS_P2: tl.constexpr, DIM_P2: tl.constexpr,
):  # fmt: skip
    """A token's keys [heads, head_dim] into the block of that entry, around its mean."""
    at = channel_offsets(HEAD_DIM, HEADS_P2, DIM_P2)
    there = channel_mask(HEADS, HEAD_DIM, HEADS_P2, DIM_P2)
    heads = tl.arange(0, HEADS_P2)
    mean = block_part(origin, table, entry, OF_K_MEAN, ALIGNED).to(tl.pointer_type(tl.bfloat16))
    value -= tl.load(mean + at, mask=there, other=0.0).to(tl.float32)
    q, step = encoded(value)
    tl.store(block_part(origin, table, entry, OF_K, ALIGNED) + token * (HEADS * HEAD_DIM) + at, q, mask=there)
    scale = block_part(origin, table, entry, OF_K_SCALE, ALIGNED).to(tl.pointer_type(tl.bfloat16))
    tl.store(scale + token * HEADS + heads, step, mask=heads < HEADS)


@triton.jit
def _store_queries(
    value, token, tokens, blocks, softmax_scale, origin, table, q8, q_scale, q_mean, ALIGNED: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS_P2: tl.constexpr, DIM_P2: tl.constexpr,
):  # fmt: skip
    """A token's queries [heads, head_dim] as ``triton_prepare`` has them: 8 bits, and q . k_mean of every block."""
    at = channel_offsets(HEAD_DIM, HEADS_P2, DIM_P2)
    there = channel_mask(HEADS, HEAD_DIM, HEADS_P2, DIM_P2)
    heads = tl.arange(0, HEADS_P2)
    scale, inverse = quantize_scales(tl.max(magnitude_bits(value), 1), 127.0)
    line = heads.to(tl.int64) * tokens + token
    apart = (line * HEAD_DIM - heads * HEAD_DIM)[:, None]
    tl.store(q8 + apart + at, to_8bit(value * inverse[:, None], True), mask=there)
    tl.store(q_scale + line, scale * softmax_scale, mask=heads < HEADS)
    for block in range(blocks):
        k_mean = block_part(origin, table, block, OF_K_MEAN, ALIGNED).to(tl.pointer_type(tl.bfloat16))
        mean = tl.load(k_mean + at, mask=there, other=0.0).to(tl.float32)
        dot = tl.sum(value * mean, 1) * softmax_scale
        tl.store(q_mean + block * HEADS * tokens + line, dot, mask=heads < HEADS)


@triton.jit(do_not_specialize=["slot", "blocks"])
def _store_kernel(
    q,
    k,
    v,
    q_weight,
    k_weight,
    cos,
    sin,
    sink_k,
    sink_scale,
    sink_mean,
    sink_cos,
    sink_sin,
    origin,
    table,
    q8,
    q_scale,
    q_mean,
    slot,
    blocks,
    tokens,
    sink_tokens,
    stride_q,
    stride_k,
    stride_vt,
    stride_vn,
    q_eps,
    k_eps,
    softmax_scale,
    ALIGNED: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_P2: tl.constexpr,
    DIM_P2: tl.constexpr,
):
    """A program for each token's keys, which go into block ``slot``, then for its queries, then for each of the sink's
    tokens, whose rotated keys go into the last of ``blocks``, then for each head and tile of values, for that slot."""
    program = tl.program_id(0)
    if program < tokens:
        token = program.to(tl.int64)
        value = normed_rope(
            k + token * stride_k, k_weight, cos, sin, token, k_eps, HEADS, HEAD_DIM, HEADS_P2, DIM_P2, True
        )
        _store_keys(value, token, origin, table, slot, ALIGNED, HEADS, HEAD_DIM, HEADS_P2, DIM_P2)
    elif program < 2 * tokens:
        token = (program - tokens).to(tl.int64)
        value = normed_rope(
            q + token * stride_q, q_weight, cos, sin, token, q_eps, HEADS, HEAD_DIM, HEADS_P2, DIM_P2, True
        )
        _store_queries(
            value, token, tokens, blocks, softmax_scale, origin, table, q8, q_scale, q_mean, ALIGNED, HEADS, HEAD_DIM,
            HEADS_P2, DIM_P2,
        )  # fmt: skip
    elif program < 2 * tokens + sink_tokens:
        token = (program - 2 * tokens).to(tl.int64)
        value = rotated_key(sink_k, sink_scale, sink_mean, sink_cos, sink_sin, token, HEADS, HEAD_DIM, HEADS_P2, DIM_P2)
        _store_keys(value, token, origin, table, blocks - 1, ALIGNED, HEADS, HEAD_DIM, HEADS_P2, DIM_P2)
    else:
        number = program - 2 * tokens - sink_tokens
        head, tile = number % HEADS, number // HEADS
        step = block_part(origin, table, slot, OF_V_SCALE, ALIGNED).to(tl.pointer_type(tl.bfloat16))
        sums = block_part(origin, table, slot, OF_V_SUMS, ALIGNED).to(tl.pointer_type(tl.int16))
        kept = block_part(origin, table, slot, OF_V, ALIGNED)
        store_tile(v + head.to(tl.int64) * stride_vn, stride_vt, step, kept, sums, head, tile, tokens, HEAD_DIM, DIM_P2)


def attend_projected_triton(
    own: Projected, slot: int, blocks: Sequence[KVBlock], sink: TurnedSink, tile: Tile | None = None
) -> Tensor:
    """As ``projected.attend_projected`` has checked it.

    Raises:
        ValueError: head_dim is above 256, or a block's parts are not contiguous and aligned to 16 bytes.
    """
    room = sink.room or room_for_keys(sink.block)  # to stay until attention has been asked for
    ready, out = prepared(own, slot, blocks, dataclasses.replace(sink, room=room))
    attend_prepared(ready, out, tile)
    return out[0]


def prepared(own: Projected, slot: int, blocks: Sequence[KVBlock], sink: TurnedSink) -> tuple[Prepared, Tensor]:
    """All but the attention, and room for its result [1, T, N, H]. ``sink`` has room for its rotated keys."""
    q, k, v = own.q, own.k, own.v_TNH
    tokens, heads, head_dim = v.shape
    room = sink.room
    assert room is not None
    turned = dataclasses.replace(sink.block, k=room.k, k_scale=room.k_scale, k_mean=room.k_mean)
    ready, out = room_for(1, tokens, k.x_TD.dtype, [[*blocks, turned]])
    q_TD, k_TD = (x if x.stride(1) == 1 else x.contiguous() for x in (q.x_TD, k.x_TD))
    v = v if v.stride(2) == 1 else v.contiguous()
    tables = [packed(table) for table in (own.cos_TP, own.sin_TP)]
    kept = (sink.block.k, sink.block.k_scale, sink.block.k_mean, packed(sink.cos_TP), packed(sink.sin_TP))
    shape = block_shape(heads, head_dim)
    # Both passes compute a key with the same roundings: it is the same number that is summed and that is stored.
    options = {"num_warps": row_warps(heads * head_dim), "enable_fp_fusion": False}
    means(k, k_TD, v, tables, kept, blocks[slot], room.k_mean, shape, options)
    launch(
        _store_kernel,
        (2 * tokens + sink.block.tokens + blocks[slot].v.shape[1] * heads,),
        q_TD,
        k_TD,
        v,
        packed(q.weight_D),
        packed(k.weight_D),
        *tables,
        *kept,
        ready.origin,
        ready.table,
        ready.q8,
        ready.q_scale,
        ready.q_mean,
        slot,
        len(blocks) + 1,
        tokens,
        sink.block.tokens,
        q_TD.stride(0),
        k_TD.stride(0),
        v.stride(0),
        v.stride(1),
        q.eps,
        k.eps,
        softmax_scale(head_dim),
        ALIGNED=ready.aligned,
        **shape,
        **options,
    )
    spread(ready)
    return ready, out


def aot_cases(generation: int) -> list[Case]:
    return _aot_cases(40, "*bf16", "i32:16", 16)


def more_aot_cases(generation: int) -> list[Case]:
    cases = [case for heads in (13, 20) for case in _aot_cases(heads, "*fp32", "i32", 2)]
    return [dataclasses.replace(case, name=f"{case.name} {case.constants['HEADS']} heads") for case in cases]


def _aot_cases(heads: int, x: str, number: str, aligned: int) -> list[Case]:
    head_dim = 128
    shape, warps = block_shape(heads, head_dim), row_warps(heads * head_dim)
    tables = dict.fromkeys(("cos", "sin", "sink_cos", "sink_sin"), "*fp32")
    kept = {"sink_k": "*i8", "sink_scale": "*bf16", "sink_mean": "*bf16"}
    floats = dict.fromkeys(("q_eps", "k_eps", "softmax_scale"), "fp32")
    queries = {"q8": "*i8", "q_scale": "*fp32", "q_mean": "*fp32", "origin": "*i8", "table": "*i64"}
    own = {"q": x, "k": x, "v": x, "q_weight": "*bf16", "k_weight": "*bf16", "slot": "i32", "blocks": "i32"}
    strides = dict.fromkeys(("stride_q", "stride_k", "stride_vt", "stride_vn"), "i32:16")
    return [
        Case(
            name="attend_projected",
            kernel=_store_kernel,
            types=tables | kept | queries | own | strides | floats | {"tokens": number, "sink_tokens": number},
            constants=shape | {"ALIGNED": aligned},
            num_warps=warps,
            fp_fusion=False,
        ),
    ]
