"""Per-token quantization in one pass: a program holds one row in registers."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from lowvram_kernels import rotation
from lowvram_kernels.aot import Case
from lowvram_kernels.launch import launch
from lowvram_kernels.rows import QMAX

Tensor = torch.Tensor

FLOOR_BITS = tl.constexpr((127 - 100) << 23)  # 2^-100 as float32
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: added to |y| < 2^22 it leaves round(y) in the low bits
ABS_MASK = tl.constexpr(0x7FFFFFFF)
SYLVESTER = tl.constexpr(rotation.SYLVESTER)


@triton.jit
def quantize_scales(amax_bits, QMAX: tl.constexpr):
    """Largest magnitudes, as float32 bits -> (scale, 1 / scale)."""
    scale = tl.maximum(amax_bits, FLOOR_BITS).to(tl.float32, bitcast=True) * (1.0 / QMAX)
    return scale, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def magnitude_bits(x):
    # Compared as integers NaN is above infinity, and infinity above all numbers: neither gets lost in a maximum.
    return x.to(tl.int32, bitcast=True) & ABS_MASK


@triton.jit
def to_8bit(y, INT8: tl.constexpr):
    if INT8:
        # Rounds half to even as torch.round does, without a conversion instruction of a quarter of the rate.
        return (y + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return y.to(tl.float8e4nv)


@triton.jit
def rotate_fours(value, APART: tl.constexpr):
    """Of four values that are so far apart each becomes their sum less twice itself."""
    LENGTH: tl.constexpr = value.shape[0]
    four = tl.reshape(value, [LENGTH // (4 * APART), 4, APART])
    return tl.reshape(tl.sum(four, 1, keep_dims=True) - 2.0 * four, [LENGTH])


@triton.jit
def rotate_groups(value, GROUP: tl.constexpr):
    """Each group of neighbours times ``rotation.matrix``. A program that stores 8 bits has 16 neighbours in a thread
    and 512 in a warp, so that the compiler moves no value within 16, and sums within 512 from thread to thread without
    shared memory."""
    LENGTH: tl.constexpr = value.shape[0]
    BITS: tl.constexpr = GROUP.bit_length() - 1
    PAIRS: tl.constexpr = BITS // 2 if GROUP > SYLVESTER else 0
    for bit in tl.static_range(BITS - 2 * PAIRS):
        a, b = tl.split(tl.permute(tl.reshape(value, [LENGTH // (2 << bit), 2, 1 << bit]), (0, 2, 1)))
        value = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [LENGTH])
    for pair in tl.static_range(PAIRS):
        value = rotate_fours(value, 1 << (BITS - 2 * PAIRS + 2 * pair))
    return value * (GROUP**-0.5)


@triton.jit
def _quantize_rows_kernel(
    x,
    smooth,
    q,
    scale,
    K,
    stride_xm,
    QMAX: tl.constexpr,
    INT8: tl.constexpr,
    SMOOTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    inside = columns < K
    value = tl.load(x + row * stride_xm + columns, mask=inside, other=0.0).to(tl.float32)
    if SMOOTH:
        value *= tl.load(smooth + columns, mask=inside, other=0.0).to(tl.float32)
    if GROUP > 1:
        value = rotate_groups(value, GROUP)
    row_scale, inverse = quantize_scales(tl.max(magnitude_bits(value), 0), QMAX)
    tl.store(q + row * K + columns, to_8bit(value * inverse, INT8), mask=inside)
    tl.store(scale + row, row_scale)


def packed(x: Tensor) -> Tensor:
    """``x.contiguous()`` without a call through the dispatcher where nothing is to be done."""
    return x if x.is_contiguous() else x.contiguous()


def power_of_2(number: int) -> int:
    """The smallest that is no less. Triton's own functions for such things cost Python as much as a small launch."""
    return 1 << (number - 1).bit_length()


def row_warps(width: int) -> int:
    """Warps for a program that holds ``width`` float32: at most 32 values a thread."""
    return min(16, max(1, power_of_2(width) // 1024))


def quantize_rows_triton(
    x_MK: Tensor, dtype: torch.dtype, group: int = 1, smooth_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As ``rows.quantize_rows``, for at least one row and column."""
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    rows, width = x_MK.shape
    q = torch.empty((rows, width), dtype=dtype, device=x_MK.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x_MK.device)
    launch(
        _quantize_rows_kernel,
        (rows,),
        x_MK,
        x_MK if smooth_K is None else packed(smooth_K),
        q,
        scale,
        width,
        x_MK.stride(0),
        QMAX=QMAX[dtype],
        INT8=dtype is torch.int8,
        SMOOTH=smooth_K is not None,
        GROUP=group,
        BLOCK_K=power_of_2(width),
        num_warps=row_warps(width),
        enable_fp_fusion=False,  # a product fused with the rounding would round once where PyTorch rounds twice
    )
    return q, scale


def more_aot_cases(generation: int) -> list[Case]:
    """Groups of other sizes, as other widths and earlier artifacts have them."""
    rows = [case for case in aot_cases(generation) if "rotated" in case.name and "smoothed" not in case.name]
    return [
        dataclasses.replace(case, name=f"{case.name} by {group}", constants={**case.constants, "GROUP": group})
        for case in rows
        for group in (rotation.SYLVESTER, 32, 64, 128)
    ]


def aot_cases(generation: int) -> list[Case]:
    cases = []
    for width in (5120, 13824):
        kinds = {
            "int8": (True, False, 1),
            "int8 rotated": (True, False, rotation.GROUP),
            "int8 smoothed rotated": (True, True, rotation.GROUP),
        } | ({"fp8": (False, False, 1)} if generation >= 89 else {})
        for kind, (int8, smooth, group) in kinds.items():
            types = {"x": "*bf16", "smooth": "*bf16", "q": "*i8" if int8 else "*fp8e4nv", "scale": "*fp32"}
            types |= {"K": "i32:16"}
            constants = {"QMAX": 127.0 if int8 else 448.0, "INT8": int8, "SMOOTH": smooth, "GROUP": group}
            cases.append(
                Case(
                    name=f"quantize_rows {kind} {width}",
                    kernel=_quantize_rows_kernel,
                    types=types | {"stride_xm": "i32:16"},
                    constants=constants | {"BLOCK_K": power_of_2(width)},
                    num_warps=row_warps(width),
                    fp_fusion=False,
                )
            )
    return cases
