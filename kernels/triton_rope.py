"""RMSNorm with RoPE, and the codec of keys; a program holds one token of all heads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lowvram_kernels.aot import Case
from lowvram_kernels.launch import launch
from lowvram_kernels.ring_codec import STEP, KVBlock
from lowvram_kernels.rope import Projection
from lowvram_kernels.triton_rows import FLOOR_BITS, magnitude_bits, packed, power_of_2, row_warps, to_8bit

Tensor = torch.Tensor

SCALE_STEP = tl.constexpr(STEP)


@triton.jit
def channel_offsets(HEAD_DIM: tl.constexpr, HEADS_P2: tl.constexpr, DIM_P2: tl.constexpr):
    """Offsets of a token's channels as [heads, head_dim]: neighbours in memory are such in a thread and in a warp."""
    return tl.arange(0, HEADS_P2)[:, None] * HEAD_DIM + tl.arange(0, DIM_P2)[None, :]


@triton.jit
def channel_mask(HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS_P2: tl.constexpr, DIM_P2: tl.constexpr):
    return (tl.arange(0, HEADS_P2) < HEADS)[:, None] & (tl.arange(0, DIM_P2) < HEAD_DIM)[None, :]


@triton.jit
def _rotated(x, cos, sin, token, HEAD_DIM: tl.constexpr):
    """Rotate [heads, head_dim] by a token's row of ``cos`` and ``sin`` [tokens, head_dim / 2]."""
    HEADS_P2: tl.constexpr = x.shape[0]
    DIM_P2: tl.constexpr = x.shape[1]
    pairs = tl.arange(0, DIM_P2 // 2)
    at = token * (HEAD_DIM // 2) + pairs
    c = tl.load(cos + at, mask=pairs < HEAD_DIM // 2, other=0.0)[None, :]
    s = tl.load(sin + at, mask=pairs < HEAD_DIM // 2, other=0.0)[None, :]
    even, odd = tl.split(tl.reshape(x, [HEADS_P2, DIM_P2 // 2, 2]))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [HEADS_P2, DIM_P2])


@triton.jit
def normed_rope(
    row,
    weight,
    cos,
    sin,
    token,
    eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_P2: tl.constexpr,
    DIM_P2: tl.constexpr,
    ROPE: tl.constexpr,
):
    """A token's channels at ``row``, normed over all of them and rotated: float32 [heads, head_dim]."""
    at = channel_offsets(HEAD_DIM, HEADS_P2, DIM_P2)
    there = channel_mask(HEADS, HEAD_DIM, HEADS_P2, DIM_P2)
    value = tl.load(row + at, mask=there, other=0.0).to(tl.float32)
    squares = tl.sum(tl.sum(value * value, 1), 0)
    value *= 1.0 / tl.sqrt_rn(squares / (HEADS * HEAD_DIM) + eps)
    value *= tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    if ROPE:
        value = _rotated(value, cos, sin, token, HEAD_DIM)
    return value


@triton.jit
def rotated_key(
    k,
    k_scale,
    k_mean,
    cos,
    sin,
    token,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_P2: tl.constexpr,
    DIM_P2: tl.constexpr,
):
    """A token's keys of an encoded block, decoded and rotated: float32 [heads, head_dim]."""
    at = channel_offsets(HEAD_DIM, HEADS_P2, DIM_P2)
    there = channel_mask(HEADS, HEAD_DIM, HEADS_P2, DIM_P2)
    heads = tl.arange(0, HEADS_P2)
    scale = tl.load(k_scale + token * HEADS + heads, mask=heads < HEADS, other=0.0).to(tl.float32)
    value = tl.load(k + token * (HEADS * HEAD_DIM) + at, mask=there, other=0).to(tl.float32)
    value = value * scale[:, None] + tl.load(k_mean + at, mask=there, other=0.0).to(tl.float32)
    return _rotated(value, cos, sin, token, HEAD_DIM)


@triton.jit
def encoded(value):
    """[heads, head_dim] float32 -> int8 and the scale of each head, bfloat16 [heads]."""
    step, inverse = bfloat16_steps(tl.maximum(tl.max(magnitude_bits(value), 1), FLOOR_BITS))
    return to_8bit(value * inverse[:, None], True), step


@triton.jit
def bfloat16_steps(amax_bits):
    """Largest magnitudes, as float32 bits -> (scale in bfloat16, 1 / scale in float32)."""
    step = amax_bits.to(tl.float32, bitcast=True) * SCALE_STEP
    # Rounded to the 8 bits of a bfloat16 by splitting (Veltkamp): exact in the conversion below wherever this runs.
    high = step * 65537.0
    step = high - (high - step)
    return step.to(tl.bfloat16), tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)


@triton.jit
def _norm_rope_kernel(
    x,
    weight,
    out,
    stride_x,
    eps,
    more_x,
    more_weight,
    more_out,
    more_stride,
    more_eps,
    cos,
    sin,
    tokens,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_P2: tl.constexpr,
    DIM_P2: tl.constexpr,
    ROPE: tl.constexpr,
    MORE: tl.constexpr,
):
    """A token a program; with MORE those of another projection behind the ``tokens`` of the first."""
    token = tl.program_id(0).to(tl.int64)
    if MORE:
        second = token >= tokens
        token -= tl.where(second, tokens, 0)
        x, weight = tl.where(second, more_x, x), tl.where(second, more_weight, weight)
        out, stride_x = tl.where(second, more_out, out), tl.where(second, more_stride, stride_x)
        eps = tl.where(second, more_eps, eps)
    at = channel_offsets(HEAD_DIM, HEADS_P2, DIM_P2)
    there = channel_mask(HEADS, HEAD_DIM, HEADS_P2, DIM_P2)
    value = normed_rope(x + token * stride_x, weight, cos, sin, token, eps, HEADS, HEAD_DIM, HEADS_P2, DIM_P2, ROPE)
    tl.store(out + token * (HEADS * HEAD_DIM) + at, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def _rotated_keys_kernel(
    k,
    k_scale,
    k_mean,
    cos,
    sin,
    out,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_P2: tl.constexpr,
    DIM_P2: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = channel_offsets(HEAD_DIM, HEADS_P2, DIM_P2)
    there = channel_mask(HEADS, HEAD_DIM, HEADS_P2, DIM_P2)
    value = rotated_key(k, k_scale, k_mean, cos, sin, token, HEADS, HEAD_DIM, HEADS_P2, DIM_P2)
    tl.store(out + token * (HEADS * HEAD_DIM) + at, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def _encode_kernel(
    x,
    mean,
    q,
    scale,
    stride_xt,
    stride_xn,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_P2: tl.constexpr,
    DIM_P2: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS_P2)
    at = channel_offsets(HEAD_DIM, HEADS_P2, DIM_P2)
    there = channel_mask(HEADS, HEAD_DIM, HEADS_P2, DIM_P2)
    apart = heads[:, None] * (stride_xn - HEAD_DIM)
    value = tl.load(x + token * stride_xt + apart + at, mask=there, other=0.0)
    value = value.to(tl.float32) - tl.load(mean + at, mask=there, other=0.0).to(tl.float32)
    q_values, step = encoded(value)
    tl.store(q + token * (HEADS * HEAD_DIM) + at, q_values, mask=there)
    tl.store(scale + token * HEADS + heads, step, mask=heads < HEADS)


@functools.cache
def block_shape(heads: int, head_dim: int) -> dict[str, int]:
    return {"HEADS": heads, "HEAD_DIM": head_dim, "HEADS_P2": power_of_2(heads), "DIM_P2": power_of_2(head_dim)}


def norm_rope_triton(
    x_TD: Tensor, weight_D: Tensor, eps: float, heads: int, cos_TP: Tensor | None, sin_TP: Tensor | None
) -> Tensor:
    table = None if cos_TP is None or sin_TP is None else (packed(cos_TP), packed(sin_TP))
    return _normed([Projection(x_TD, weight_D, eps)], heads, table)[0]


def norm_both_triton(first: Projection, second: Projection, heads: int) -> tuple[Tensor, Tensor]:
    q, k = _normed([first, second], heads, None)
    return q, k


def _normed(projections: Sequence[Projection], heads: int, table: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """Of one projection, rotated by a table if there is one, or of two."""
    operands = []
    for one in projections:
        x = one.x_TD if one.x_TD.stride(1) == 1 else one.x_TD.contiguous()
        out = torch.empty((len(x), heads, x.shape[1] // heads), dtype=x.dtype, device=x.device)
        operands.append((x, packed(one.weight_D), out, x.stride(0), one.eps))
    outs = [operand[2] for operand in operands]
    tokens, _, head_dim = outs[0].shape
    launch(
        _norm_rope_kernel,
        (sum(map(len, outs)),),
        *operands[0],
        *operands[-1],
        *(table or operands[0][:1] * 2),
        tokens,
        ROPE=table is not None,
        MORE=len(outs) > 1,
        **block_shape(heads, head_dim),
        num_warps=row_warps(heads * head_dim),
        enable_fp_fusion=True,
    )
    return outs


def rotated_keys_triton(block: KVBlock, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    tokens, heads, head_dim = block.k.shape
    out = torch.empty(block.k.shape, dtype=torch.bfloat16, device=block.k.device)
    launch(
        _rotated_keys_kernel,
        (tokens,),
        block.k,
        block.k_scale,
        block.k_mean,
        packed(cos_TP),
        packed(sin_TP),
        out,
        **block_shape(heads, head_dim),
        num_warps=row_warps(heads * head_dim),
        enable_fp_fusion=True,
    )
    return out


def encode_keys_triton(k_TNH: Tensor, out: KVBlock) -> None:
    """Around ``out.k_mean``, which is there."""
    k_TNH = k_TNH if k_TNH.stride(2) == 1 else k_TNH.contiguous()
    tokens, heads, head_dim = k_TNH.shape
    launch(
        _encode_kernel,
        (tokens,),
        k_TNH,
        out.k_mean,
        out.k,
        out.k_scale,
        k_TNH.stride(0),
        k_TNH.stride(1),
        **block_shape(heads, head_dim),
        num_warps=row_warps(heads * head_dim),
        enable_fp_fusion=False,  # rounds where PyTorch rounds
    )


def aot_cases(generation: int) -> list[Case]:
    return _aot_cases(40, "*bf16")


def more_aot_cases(generation: int) -> list[Case]:
    cases = [case for heads in (13, 20) for case in _aot_cases(heads, "*fp32")]
    return [dataclasses.replace(case, name=f"{case.name} {case.constants['HEADS']} heads") for case in cases]


def _aot_cases(heads: int, x: str) -> list[Case]:
    head_dim = 128
    warps = row_warps(heads * head_dim)
    tables = {"cos": "*fp32", "sin": "*fp32", "out": "*bf16"}
    normed = dict.fromkeys(("x", "more_x"), x) | dict.fromkeys(("weight", "more_weight", "more_out"), "*bf16")
    normed |= dict.fromkeys(("stride_x", "more_stride"), "i32:16") | dict.fromkeys(("eps", "more_eps"), "fp32")
    shape = block_shape(heads, head_dim)
    return [
        *(
            Case(
                name=f"norm_rope{' both' if both else ''}",
                kernel=_norm_rope_kernel,
                types=tables | normed | {"tokens": "i32:16"},
                constants=shape | {"ROPE": not both, "MORE": both},
                num_warps=warps,
            )
            for both in (False, True)
        ),
        Case(
            name="rotate_keys",
            kernel=_rotated_keys_kernel,
            types=tables | {"k": "*i8", "k_scale": "*bf16", "k_mean": "*bf16"},
            constants=shape,
            num_warps=warps,
        ),
        Case(
            name="encode_kv keys",
            kernel=_encode_kernel,
            types={"x": x, "mean": "*bf16", "q": "*i8", "scale": "*bf16"}
            | {"stride_xt": "i32:16", "stride_xn": "i32:16"},
            constants=block_shape(heads, head_dim),
            num_warps=warps,
            fp_fusion=False,
        ),
    ]
