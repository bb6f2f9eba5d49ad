"""W8A8 linear layers: activations quantized per token at run time, weights per output channel beforehand.

Order of preference: int8 through ``torch._int_mm`` (CPU with AVX512-VNNI or AMX, and CUDA from sm_80 on); fp8 through
row-wise ``torch._scaled_mm`` (CPU, and CUDA from sm_89 on). A GPU without FP8 units runs fp8 weights weight-only; the
kernel's name in the run's report says so, and a warning is given once.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch.nn import functional as F

from lowvram_kernels.rows import quantize_rows
from lowvram_kernels.trace import record

Tensor = torch.Tensor
log = logging.getLogger(__name__)


def linear_w8a8(x: Tensor, weight_NK: Tensor, weight_scale_N: Tensor, bias_N: Tensor | None) -> Tensor:
    """``x @ (weight * scale).T + bias`` in 8-bit arithmetic: [..., K] -> [..., N] in the dtype of ``x``.

    Tolerance against float64 on normal random data (relative error, norm): int8 about 1 %, fp8 about 4 %.

    Raises:
        TypeError: the weight is neither int8 nor float8_e4m3fn, or x is not floating point.
        ValueError: shapes do not fit.
    """
    _check(x, weight_NK, weight_scale_N, bias_N)
    name, kernel = _select(x, weight_NK)
    record("linear_w8a8", name)
    out = kernel(x.reshape(-1, x.shape[-1]), weight_NK, weight_scale_N, bias_N)
    return out.to(x.dtype).view(*x.shape[:-1], weight_NK.shape[0])


def reference_w8a8(x_MK: Tensor, weight_NK: Tensor, weight_scale_N: Tensor, bias_N: Tensor | None) -> Tensor:
    """The same in float64 on the quantized operands: what every kernel has to meet."""
    q, scale = quantize_rows(x_MK, weight_NK.dtype)
    out = (q.double() @ weight_NK.double().t()) * scale.double() * weight_scale_N.double()
    return out if bias_N is None else out + bias_N.double()


def int8_mm(x_MK: Tensor, weight_NK: Tensor, weight_scale_N: Tensor, bias_N: Tensor | None) -> Tensor:
    q, scale = quantize_rows(x_MK, torch.int8)
    rows = q.shape[0]
    if x_MK.is_cuda and rows <= 16:  # cuBLASLt takes more than 16 rows only
        q = F.pad(q, (0, 0, 0, 32 - rows))
    product = torch._int_mm(q, weight_NK.t())[:rows]
    return _epilogue(product.float().mul_(scale), weight_scale_N, bias_N)


def fp8_mm(x_MK: Tensor, weight_NK: Tensor, weight_scale_N: Tensor, bias_N: Tensor | None) -> Tensor:
    q, scale = quantize_rows(x_MK, torch.float8_e4m3fn)
    if x_MK.is_cuda:  # row-wise scales come with bfloat16 output there
        bias = None if bias_N is None else bias_N.bfloat16()
        return torch._scaled_mm(
            q, weight_NK.t(), scale, weight_scale_N[None], bias=bias, out_dtype=torch.bfloat16, use_fast_accum=False
        )
    one = scale.new_ones(())
    product = torch._scaled_mm(q, weight_NK.t(), one, one, out_dtype=torch.float32)
    return _epilogue(product.mul_(scale), weight_scale_N, bias_N)


def fp8_weight_only(x_MK: Tensor, weight_NK: Tensor, weight_scale_N: Tensor, bias_N: Tensor | None) -> Tensor:
    weight = weight_NK.to(x_MK.dtype) * weight_scale_N[:, None].to(x_MK.dtype)
    return F.linear(x_MK, weight, None if bias_N is None else bias_N.to(x_MK.dtype))


def _epilogue(product: Tensor, weight_scale_N: Tensor, bias_N: Tensor | None) -> Tensor:
    product.mul_(weight_scale_N)
    return product if bias_N is None else product.add_(bias_N)


def _select(x: Tensor, weight: Tensor):
    if weight.dtype is torch.int8:
        return "int8: torch._int_mm", int8_mm
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        _say_weight_only(torch.cuda.get_device_name(x.device))
        return "fp8: dequantized weight, no FP8 units", fp8_weight_only
    return "fp8: torch._scaled_mm", fp8_mm


@functools.cache
def _say_weight_only(device: str) -> None:
    log.warning("%s has no FP8 units: fp8 weights are dequantized at use; an int8 artifact is faster there", device)


def _check(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    if weight.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise TypeError(f"weight is {weight.dtype}; a W8A8 linear takes int8 or float8_e4m3fn")
    if not x.is_floating_point() or x.dtype is torch.float8_e4m3fn:
        raise TypeError(f"x is {x.dtype}; a W8A8 linear quantizes float32, float16 or bfloat16 itself")
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit: [..., K] and [N, K]")
    if scale.shape != weight.shape[:1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"scale {tuple(scale.shape)} and bias have to be [{len(weight)}], one for each output channel")
