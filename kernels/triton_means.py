"""What has to be known of a block before any of it is stored: the mean over its keys, normed and rotated, and each
channel's largest value; and the mean over a sink's keys, rotated anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from lowvram_kernels.aot import Case
from lowvram_kernels.launch import launch
from lowvram_kernels.ring_codec import KVBlock
from lowvram_kernels.rope import Projection
from lowvram_kernels.triton_rope import (
    bfloat16_steps,
    block_shape,
    channel_mask,
    channel_offsets,
    normed_rope,
    rotated_key,
)
from lowvram_kernels.triton_rows import FLOOR_BITS, magnitude_bits, packed, row_warps

Tensor = torch.Tensor

MEAN_ROWS, MEAN_COLUMNS = 32, 32
# Of one program: fewer write more sums, more leave processors of a large chip idle. Registers let one program of 40
# heads onto a processor at a time; what 12 gains over other numbers is not measured.
SUM_TOKENS = 12


@triton.jit
def _sum_kernel(
    k,
    v,
    weight,
    cos,
    sin,
    sink_k,
    sink_scale,
    sink_mean,
    sink_cos,
    sink_sin,
    sums,
    tokens,
    sink_tokens,
    stride_k,
    stride_vt,
    stride_vn,
    eps,
    SUM_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_P2: tl.constexpr,
    DIM_P2: tl.constexpr,
):
    """Sums over SUM_TOKENS tokens each of the normed, rotated keys, then of the sink's rotated ones; then the largest
    magnitudes of such tokens' values: float32 [programs and those of the block once more, heads, head_dim]."""
    at = channel_offsets(HEAD_DIM, HEADS_P2, DIM_P2)
    there = channel_mask(HEADS, HEAD_DIM, HEADS_P2, DIM_P2)
    own = tl.cdiv(tokens, SUM_TOKENS)
    total = tl.zeros((HEADS_P2, DIM_P2), tl.float32)
    if tl.program_id(0) < own:
        first = tl.program_id(0) * SUM_TOKENS
        largest = tl.zeros((HEADS_P2, DIM_P2), tl.int32)
        apart = tl.arange(0, HEADS_P2)[:, None] * (stride_vn - HEAD_DIM)
        for index in range(tl.minimum(SUM_TOKENS, tokens - first)):
            token = (first + index).to(tl.int64)
            value = tl.load(v + token * stride_vt + apart + at, mask=there, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, magnitude_bits(value))
            total += normed_rope(
                k + token * stride_k, weight, cos, sin, token, eps, HEADS, HEAD_DIM, HEADS_P2, DIM_P2, True
            )
        line = (tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (HEADS * HEAD_DIM)
        tl.store(sums + line + at, largest.to(tl.float32, bitcast=True), mask=there)
    else:
        first = (tl.program_id(0) - own) * SUM_TOKENS
        for index in range(tl.minimum(SUM_TOKENS, sink_tokens - first)):
            token = (first + index).to(tl.int64)
            total += rotated_key(
                sink_k, sink_scale, sink_mean, sink_cos, sink_sin, token, HEADS, HEAD_DIM, HEADS_P2, DIM_P2
            )
    tl.store(sums + tl.program_id(0).to(tl.int64) * (HEADS * HEAD_DIM) + at, total, mask=there)


@triton.jit
def _mean_kernel(
    sums,
    mean,
    sink_mean,
    v_scale,
    tokens,
    sink_tokens,
    width,
    SUM_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """From these the mean of the block's keys (second program id 0), of the sink's (1) and the scales of the block's
    values (2), a few columns each."""
    own, kind = tl.cdiv(tokens, SUM_TOKENS), tl.program_id(1)
    count = tl.where(kind == 1, sink_tokens, tokens)
    begin = tl.where(kind == 0, 0, own)
    begin += tl.where(kind == 2, tl.cdiv(sink_tokens, SUM_TOKENS), 0)
    end = begin + tl.cdiv(count, SUM_TOKENS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    largest = tl.zeros((ROWS, COLUMNS), tl.int32)
    for first in range(begin, end, ROWS):
        row = (first + rows)[:, None]
        there = (row < end) & (columns < width)[None, :]
        part = tl.load(sums + row * width + columns[None, :], mask=there, other=0.0)
        total += part
        largest = tl.maximum(largest, part.to(tl.int32, bitcast=True))
    if kind == 2:
        step, _ = bfloat16_steps(tl.maximum(tl.max(largest, 0), FLOOR_BITS))
        tl.store(v_scale + columns, step, mask=columns < width)
    else:
        target = tl.where(kind == 1, sink_mean, mean)
        tl.store(target + columns, (tl.sum(total, 0) / count).to(target.dtype.element_ty), mask=columns < width)


def means(
    k: Projection,
    k_TD: Tensor,
    v_TNH: Tensor,
    tables: Sequence[Tensor],
    kept: tuple[Tensor, ...],
    block: KVBlock,
    sink_mean: Tensor,
    shape: dict[str, int],
    options: dict[str, Any],
) -> None:
    """Means of the block's keys and of the sink's, rotated both, into ``block`` and ``sink_mean``, and the scales of
    its values. ``kept`` are the sink's keys, scales and mean, cos and sin."""
    tokens, sink_tokens, width = len(k_TD), len(kept[0]), k_TD.shape[1]
    own = -(-tokens // SUM_TOKENS)
    programs = own - (-sink_tokens // SUM_TOKENS)
    sums = torch.empty((programs + own, width), dtype=torch.float32, device=k_TD.device)
    launch(
        _sum_kernel,
        (programs,),
        k_TD,
        v_TNH,
        packed(k.weight_D),
        *tables,
        *kept,
        sums,
        tokens,
        sink_tokens,
        k_TD.stride(0),
        v_TNH.stride(0),
        v_TNH.stride(1),
        k.eps,
        SUM_TOKENS=SUM_TOKENS,
        **shape,
        **options,
    )
    launch(
        _mean_kernel,
        (-(-width // MEAN_COLUMNS), 3),
        sums,
        block.k_mean,
        sink_mean,
        block.v_scale,
        tokens,
        sink_tokens,
        width,
        SUM_TOKENS=SUM_TOKENS,
        ROWS=MEAN_ROWS,
        COLUMNS=MEAN_COLUMNS,
        num_warps=4,
        enable_fp_fusion=False,
    )


def aot_cases(generation: int) -> list[Case]:
    return _aot_cases(40, "*bf16", "i32:16")


def more_aot_cases(generation: int) -> list[Case]:
    return [
        dataclasses.replace(case, name=f"{case.name} {heads} heads")
        for heads in (13, 20)
        for case in _aot_cases(heads, "*fp32", "i32")
    ]


def _aot_cases(heads: int, x: str, number: str) -> list[Case]:
    shape, warps = block_shape(heads, 128), row_warps(heads * 128)
    tables = dict.fromkeys(("cos", "sin", "sink_cos", "sink_sin"), "*fp32")
    kept = {"sink_k": "*i8", "sink_scale": "*bf16", "sink_mean": "*bf16"}
    tokens = {"tokens": number, "sink_tokens": number}
    return [
        Case(
            name="attend_projected sums",
            kernel=_sum_kernel,
            types=tables
            | kept
            | tokens
            | {"k": x, "v": x, "weight": "*bf16", "sums": "*fp32", "eps": "fp32"}
            | dict.fromkeys(("stride_k", "stride_vt", "stride_vn"), "i32:16"),
            constants=shape | {"SUM_TOKENS": SUM_TOKENS},
            num_warps=warps,
            fp_fusion=False,
        ),
        Case(
            name="attend_projected means",
            kernel=_mean_kernel,
            types=tokens
            | {"sums": "*fp32", "mean": "*bf16", "sink_mean": "*bf16", "v_scale": "*bf16", "width": "i32:16"},
            constants={"SUM_TOKENS": SUM_TOKENS, "ROWS": MEAN_ROWS, "COLUMNS": MEAN_COLUMNS},
            num_warps=4,
            fp_fusion=False,
        ),
    ]
