"""Symmetric 8-bit quantization of each row (token): one scale a row, no zero point.

Order of preference: one Triton pass on CUDA from sm_80 on (fp8 from sm_89 on), otherwise PyTorch. Both compute the
same operations in float32, so that they agree bit by bit; where groups are rotated first, but for the order of sums.
"""

from __future__ import annotations

import torch

from lowvram_kernels.choices import TRITON, choose, rows_operation
from lowvram_kernels.rotation import check_group, rotated
from lowvram_kernels.trace import record

Tensor = torch.Tensor

# The largest magnitude that a row's largest value is mapped to. -128 is not used: the range stays symmetric.
QMAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
# Rows below this are zeros to us; it keeps scale and reciprocal inside float32.
FLOOR = 2.0**-100


def quantize_rows(
    x_MK: Tensor, dtype: torch.dtype, *, group: int = 1, smooth_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize [M, K] to ``dtype`` (int8 or float8_e4m3fn) with a float32 scale [M, 1] a row.

    With ``smooth`` (int8 only) each channel is multiplied by its factor first, for a weight that was divided by it.
    With ``group`` above 1 (int8 only) each group of so many neighbouring channels is rotated then, see ``rotation``:
    for a weight that was rotated alike.

    ``x`` is about ``q * scale``, within scale / 2 (int8) or 2^-4 relative (fp8 e4m3, normal range). A row of zeros
    gets a tiny scale; a row with NaN or infinity gets one that is not finite, so the product shows it too.

    Raises:
        TypeError: ``dtype`` is none of the two.
        ValueError: x is no matrix, K cannot be rotated in such groups, or there are not as many factors.
    """
    if dtype not in QMAX:
        raise TypeError(f"rows were to be quantized to {dtype}; known are {sorted(map(str, QMAX))}")
    if x_MK.ndim != 2:
        raise ValueError(f"x is {tuple(x_MK.shape)}; expected rows [M, K]: flatten the leading dimensions first")
    check_group(group, x_MK.shape[1], dtype)
    check_smooth(smooth_K, x_MK.shape[1], dtype)
    kind = kind_name(dtype, group)
    if x_MK.numel() and choose(rows_operation("quantize_rows", dtype, group), x_MK.device) == TRITON:
        from lowvram_kernels.triton_rows import quantize_rows_triton

        record("quantize_rows", f"{kind}: triton")
        return quantize_rows_triton(x_MK, dtype, group, smooth_K)
    record("quantize_rows", f"{kind}: torch")
    return reference_rows(x_MK, dtype, group, smooth_K)


def kind_name(dtype: torch.dtype, group: int) -> str:
    """How the run's report calls rows of that dtype, rotated or not."""
    return NAMES[dtype] + (f" rotated by {group}" if group > 1 else "")


def check_smooth(smooth_K: Tensor | None, width: int, dtype: torch.dtype) -> None:
    """Raises: ValueError where channels of rows of this width, in this dtype, cannot be multiplied by such factors."""
    if smooth_K is None:
        return
    if smooth_K.shape != (width,):
        raise ValueError(
            f"factors to smooth with are {tuple(smooth_K.shape)}; expected [{width}], one for each channel"
        )
    if dtype is not torch.int8:
        raise ValueError(f"rows were to be smoothed in {dtype}; smoothing goes with int8 rows only")


def reference_rows(
    x_MK: Tensor, dtype: torch.dtype, group: int = 1, smooth_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x32 = x_MK.float() if smooth_K is None else x_MK.float() * smooth_K.float()
    x32 = rotated(x32, group)
    if not x32.shape[1]:
        return x32.to(dtype), x32.new_full((len(x32), 1), FLOOR)
    if group == 1:
        amax = x32.abs().amax(dim=1, keepdim=True)
    else:  # what was rotated is a copy already, beside which no other has to stand
        amax = torch.maximum(x32.amax(dim=1, keepdim=True), x32.amin(dim=1, keepdim=True).neg_())
    scale = amax.clamp_min_(FLOOR).mul_(1 / QMAX[dtype])
    scaled = x32 * scale.reciprocal() if group == 1 else x32.mul_(scale.reciprocal())
    # No clamp: the largest is QMAX but for rounding errors, and still rounds to QMAX.
    return (scaled.round_() if dtype is torch.int8 else scaled).to(dtype), scale
