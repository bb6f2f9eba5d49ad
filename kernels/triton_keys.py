"""A block's keys from their projection into the ring, with its values: RMSNorm, RoPE, mean, 8 bits; in two passes.

The mean over the tokens has to be known before the first key can be stored, so the projection is read twice and normed
twice; in between nothing but sums is written. Bytes a channel of K with bfloat16 projections: 2 and 4 / 16 for a sum of
16 tokens, that sum again, then 2 and the 1 that is stored: 5.5. With a rotated copy in bfloat16 it is 9: 2 + 2 for norm
and RoPE, 2 for the mean, 2 + 1 to encode.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from lowvram_kernels.aot import Case
from lowvram_kernels.ring_codec import KVBlock
from lowvram_kernels.triton_rope import block_shape, encoded, normed_rope, pair_mask, pair_offsets
from lowvram_kernels.triton_rows import packed, row_warps

Tensor = torch.Tensor

MEAN_ROWS, MEAN_COLUMNS = 32, 32
SUM_TOKENS = 16  # of one program: fewer write more sums, more leave processors of a large chip idle


@triton.jit
def _sum_kernel(
    x,
    weight,
    cos,
    sin,
    sums,
    tokens,
    stride_x,
    eps,
    SUM_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_P2: tl.constexpr,
    PAIRS_P2: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Sums of the normed, rotated keys over SUM_TOKENS tokens each: float32 [programs, heads, head_dim]."""
    at = pair_offsets(HEAD_DIM, HEADS_P2, PAIRS_P2)
    there = pair_mask(HEADS, HEAD_DIM, HEADS_P2, PAIRS_P2)
    first = tl.program_id(0) * SUM_TOKENS
    total = tl.zeros((HEADS_P2, PAIRS_P2, 2), tl.float32)
    for index in range(tl.minimum(SUM_TOKENS, tokens - first)):
        token = (first + index).to(tl.int64)
        total += normed_rope(
            x + token * stride_x, weight, cos, sin, token, eps, HEADS, HEAD_DIM, HEADS_P2, PAIRS_P2, ROPE
        )
    tl.store(sums + tl.program_id(0).to(tl.int64) * (HEADS * HEAD_DIM) + at, total, mask=there)


@triton.jit
def _mean_kernel(
    sums,
    mean,
    programs,
    width,
    tokens,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums [programs, width] -> their total over ``tokens`` tokens as a mean [width], a few columns a program."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, programs, ROWS):
        row = (first + rows)[:, None]
        there = (row < programs) & (columns < width)[None, :]
        total += tl.load(sums + row * width + columns[None, :], mask=there, other=0.0)
    value = tl.sum(total, 0) / tokens
    tl.store(mean + columns, value.to(mean.dtype.element_ty), mask=columns < width)


@triton.jit
def _store_kernel(
    x,
    weight,
    cos,
    sin,
    mean,
    v,
    k8,
    k_scale,
    v8,
    v_scale,
    stride_x,
    stride_vt,
    stride_vn,
    eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_P2: tl.constexpr,
    PAIRS_P2: tl.constexpr,
    ROPE: tl.constexpr,
):
    """A token's keys, normed and rotated anew, around ``mean``, and then its values: int8 and scales."""
    token = tl.program_id(0).to(tl.int64)
    at = pair_offsets(HEAD_DIM, HEADS_P2, PAIRS_P2)
    there = pair_mask(HEADS, HEAD_DIM, HEADS_P2, PAIRS_P2)
    heads = tl.arange(0, HEADS_P2)
    row, line = token * (HEADS * HEAD_DIM) + at, token * HEADS + heads
    value = normed_rope(x + token * stride_x, weight, cos, sin, token, eps, HEADS, HEAD_DIM, HEADS_P2, PAIRS_P2, ROPE)
    value -= tl.load(mean + at, mask=there, other=0.0).to(tl.float32)
    q, step = encoded(value)
    tl.store(k8 + row, q, mask=there)
    tl.store(k_scale + line, step, mask=heads < HEADS)
    value = tl.load(v + token * stride_vt + at + heads[:, None, None] * (stride_vn - HEAD_DIM), mask=there, other=0.0)
    q, step = encoded(value.to(tl.float32))
    tl.store(v8 + row, q, mask=there)
    tl.store(v_scale + line, step, mask=heads < HEADS)


def encode_projected_triton(
    k_TD: Tensor,
    v_TNH: Tensor,
    weight_D: Tensor,
    eps: float,
    cos_TP: Tensor | None,
    sin_TP: Tensor | None,
    out: KVBlock,
) -> None:
    """As ``ring_codec.encode_projected`` has checked it, for at least one token."""
    k_TD = k_TD if k_TD.stride(1) == 1 else k_TD.contiguous()
    v_TNH = v_TNH if v_TNH.stride(2) == 1 else v_TNH.contiguous()
    tokens, heads, head_dim = v_TNH.shape
    table = [k_TD if t is None else packed(t) for t in (cos_TP, sin_TP)]
    shape = block_shape(heads, head_dim) | {"ROPE": cos_TP is not None}
    programs = triton.cdiv(tokens, SUM_TOKENS)
    sums = torch.empty((programs, heads, head_dim), dtype=torch.float32, device=k_TD.device)
    # Both compute a key with the same roundings: it is the same number that is summed and that is stored.
    options = {"num_warps": row_warps(heads * head_dim), "enable_fp_fusion": False}
    keys = (k_TD, packed(weight_D), *table)
    _sum_kernel[(programs,)](*keys, sums, tokens, k_TD.stride(0), eps, SUM_TOKENS=SUM_TOKENS, **shape, **options)
    columns = heads * head_dim
    _mean_kernel[(triton.cdiv(columns, MEAN_COLUMNS),)](
        sums, out.k_mean, programs, columns, tokens, ROWS=MEAN_ROWS, COLUMNS=MEAN_COLUMNS, num_warps=4
    )
    _store_kernel[(tokens,)](
        *keys,
        out.k_mean,
        v_TNH,
        out.k,
        out.k_scale,
        out.v,
        out.v_scale,
        k_TD.stride(0),
        v_TNH.stride(0),
        v_TNH.stride(1),
        eps,
        **shape,
        **options,
    )


def aot_cases(generation: int) -> list[Case]:
    return _aot_cases(40, "*bf16", "i32:16")


def more_aot_cases(generation: int) -> list[Case]:
    cases = [case for heads in (13, 20) for case in _aot_cases(heads, "*fp32", "i32")]
    return [dataclasses.replace(case, name=f"{case.name} {case.constants['HEADS']} heads") for case in cases]


def _aot_cases(heads: int, x: str, number: str) -> list[Case]:
    head_dim = 128
    shape = block_shape(heads, head_dim) | {"ROPE": True}
    keys = {"x": x, "weight": "*bf16", "cos": "*fp32", "sin": "*fp32", "stride_x": "i32:16", "eps": "fp32"}
    blocks = {"mean": "*bf16", "v": "*bf16", "k8": "*i8", "k_scale": "*bf16", "v8": "*i8", "v_scale": "*bf16"}
    warps = row_warps(heads * head_dim)
    return [
        Case(
            name="encode_projected sums",
            kernel=_sum_kernel,
            types=keys | {"sums": "*fp32", "tokens": number},
            constants=shape | {"SUM_TOKENS": SUM_TOKENS},
            num_warps=warps,
            fp_fusion=False,
        ),
        Case(
            name="encode_projected mean",
            kernel=_mean_kernel,
            types={"sums": "*fp32", "mean": "*bf16", "programs": "i32", "width": "i32:16", "tokens": "i32:16"},
            constants={"ROWS": MEAN_ROWS, "COLUMNS": MEAN_COLUMNS},
            num_warps=4,
        ),
        Case(
            name="encode_projected",
            kernel=_store_kernel,
            types=keys | blocks | {"stride_vt": "i32:16", "stride_vn": "i32:16"},
            constants=shape,
            num_warps=warps,
            fp_fusion=False,
        ),
    ]
