"""The VAE's norm over the channels of a pixel with the SiLU behind it, in one pass.

Written as PyTorch has it, the norm reads its input twice and what it makes once, SiLU reads and writes that again, and
a convolution that looks back copies it behind what it remembers; here it is read once and written once, to where the
convolution wants it. Order of preference: Triton on CUDA from sm_80 on, otherwise PyTorch. Shapes: R pixels, C
channels.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lowvram_kernels.choices import TRITON, choose
from lowvram_kernels.trace import record

Tensor = torch.Tensor

LEAST = 1e-12
"""A pixel's norm is at least so much, as ``torch.nn.functional.normalize`` has it."""


def channel_norm_silu(x_RC: Tensor, gamma_C: Tensor, out_RC: Tensor) -> Tensor:
    """silu(x / |x| * sqrt(C) * gamma), |x| of each row in float32, into ``out``, which may be x itself and is returned.

    Relative error against float64: that of one rounding to the dtype of ``out`` (PyTorch's path: of two).

    Raises:
        TypeError: not floating point.
        ValueError: shapes do not fit, or channels do not lie side by side.
    """
    if not (x_RC.is_floating_point() and out_RC.is_floating_point()):
        raise TypeError(f"x is {x_RC.dtype}, out {out_RC.dtype}; expected floating point")
    if x_RC.ndim != 2 or out_RC.shape != x_RC.shape or gamma_C.shape != x_RC.shape[1:]:
        raise ValueError(
            f"x {tuple(x_RC.shape)}, gamma {tuple(gamma_C.shape)}, out {tuple(out_RC.shape)}: expected [R, C], [C] and "
            "[R, C]"
        )
    if 1 not in (x_RC.shape[1], x_RC.stride(1)) or 1 not in (x_RC.shape[1], out_RC.stride(1)):
        raise ValueError(f"channels of x are {x_RC.stride(1)} apart, of out {out_RC.stride(1)}; expected 1 for both")
    if x_RC.numel() and choose("channel_norm_silu", x_RC.device) == TRITON and x_RC.dtype is not torch.float64:
        from lowvram_kernels.triton_channel_norm import channel_norm_silu_triton

        record("channel_norm_silu", "triton")
        return channel_norm_silu_triton(x_RC, gamma_C, out_RC)
    record("channel_norm_silu", "torch")
    return reference_channel_norm_silu(x_RC, gamma_C, out_RC)


def reference_channel_norm_silu(x_RC: Tensor, gamma_C: Tensor, out_RC: Tensor | None = None) -> Tensor:
    """The same by PyTorch; in float64 what a kernel has to meet."""
    wide = torch.float64 if x_RC.dtype is torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(x_RC, dim=1, keepdim=True, dtype=wide)
    factor = norm.clamp_min_(LEAST).reciprocal_().mul_(x_RC.shape[1] ** 0.5)
    out = torch.empty_like(x_RC) if out_RC is None else out_RC
    torch.mul(x_RC, factor, out=out)
    return F.silu(out.mul_(gamma_C), inplace=True)
