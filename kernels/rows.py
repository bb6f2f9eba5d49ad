"""Symmetric 8-bit quantization of each row (token): one scale a row, no zero point."""

from __future__ import annotations

import torch

Tensor = torch.Tensor

# The largest magnitude that a row's largest value is mapped to. -128 is not used: the range stays symmetric.
QMAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_rows(x_MK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantize [M, K] to ``dtype`` (int8 or float8_e4m3fn) with a float32 scale [M, 1] a row.

    ``x`` is about ``q * scale``, within scale / 2 (int8) or 2^-4 relative (fp8 e4m3, normal range). A row of zeros
    gets scale 1; a row with NaN or infinity gets a scale that is not finite, so the product shows it too.
    """
    if dtype not in QMAX:
        raise TypeError(f"rows were to be quantized to {dtype}; known are {sorted(map(str, QMAX))}")
    x32 = x_MK.float()
    amax = x32.abs().amax(dim=1, keepdim=True) if x32.shape[1] else x32.new_zeros(len(x32), 1)
    scale = torch.where(amax == 0, 1.0, amax / QMAX[dtype])
    scaled = x32 / scale
    if dtype is torch.int8:
        scaled = scaled.round_().clamp_(-QMAX[dtype], QMAX[dtype])
    return scaled.to(dtype), scale
