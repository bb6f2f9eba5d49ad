"""W8A8 linear layers: activations quantized per token at run time, weights per output channel beforehand.

Order of preference, which ``choices`` may change:

- int8: the Triton kernel on CUDA from sm_80 on, scales, bias and GELU in its epilogue, several products of one width
  and depth in one launch; then ``torch._int_mm`` (CUDA without Triton, and a CPU where it is right and fast); then a
  float32 product, see ``wide_product``.
- fp8: row-wise ``torch._scaled_mm`` on sm_89, sm_90 and sm_120; the Triton kernel where GELU follows, since only it
  fuses that; then a float32 product, which comes first on a CPU. A GPU without FP8 units runs fp8 weights weight-only;
  the kernel's name in the run's report says so, and a warning is given once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from lowvram_kernels.chips import counts_as_cuda, has_fp8_units, name_of
from lowvram_kernels.choices import TRITON, choose
from lowvram_kernels.cpu_products import FLOAT32, INT_MM, SCALED_MM, int_product, scaled_product
from lowvram_kernels.libraries import COMFY, TORCHAO, int8_product
from lowvram_kernels.rotation import check_group
from lowvram_kernels.rows import NAMES, check_smooth, quantize_rows, reference_rows
from lowvram_kernels.trace import record
from lowvram_kernels.wide_product import wide_product

Tensor = torch.Tensor
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""Quantized rows [M, K], their scales [M, 1], weight [N, K], its scales [N], and bias [N] if there is one."""
log = logging.getLogger(__name__)

# By dtype, and whether GELU follows: what ``choices`` is asked for, and how the run's report calls each answer.
_OPERATIONS = {
    (dtype, gelu): f"linear_w8a8 {name}{' gelu' if gelu else ''}"
    for dtype, name in NAMES.items()
    for gelu in (False, True)
}
_TOGETHER = "linears_w8a8 int8"
_REPORTED = {
    (dtype, backend): f"{name}: {backend}"
    for dtype, name in NAMES.items()
    for backend in (TRITON, INT_MM, SCALED_MM, FLOAT32, TORCHAO, COMFY)
}


def linear_w8a8(
    x: Tensor,
    weight_NK: Tensor,
    weight_scale_N: Tensor,
    bias_N: Tensor | None,
    *,
    gelu: bool = False,
    group: int = 1,
    smooth_K: Tensor | None = None,
) -> Tensor:
    """``x @ (weight * scale).T + bias`` in 8-bit arithmetic, GELU (tanh) behind it if asked: [..., K] -> [..., N].

    The result has the dtype of ``x``. ``group``: the weight's groups of so many input channels were rotated before it
    was quantized (see ``rotation``; 1: they were not), so that those of ``x`` are, too. ``smooth``: before that, its
    input channels were divided by these factors, by which those of ``x`` are multiplied.
    Tolerance against float64 on normal random data (relative error, norm): int8 about 1 %, fp8 about 4 %.

    Raises:
        TypeError: the weight is neither int8 nor float8_e4m3fn, or x is not floating point.
        ValueError: shapes do not fit, or K cannot be rotated in such groups or smoothed in this dtype.
    """
    _check(x, weight_NK, weight_scale_N, bias_N)
    check_group(group, x.shape[-1], weight_NK.dtype)
    check_smooth(smooth_K, x.shape[-1], weight_NK.dtype)
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if weight_NK.dtype is torch.float8_e4m3fn and not has_fp8_units(x.device):
        out = _weight_only(rows, weight_NK, weight_scale_N, bias_N, gelu)
    else:
        q, scale = quantize_rows(rows, weight_NK.dtype, group=group, smooth_K=smooth_K)
        out = _product(q, scale, weight_NK, weight_scale_N, bias_N, gelu, x.dtype)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], len(weight_NK))


def linear_q8(
    q_MK: Tensor,
    scale_M1: Tensor,
    weight_NK: Tensor,
    weight_scale_N: Tensor,
    bias_N: Tensor | None,
    *,
    gelu: bool = False,
    dtype: torch.dtype,
) -> Tensor:
    """The same for activations that are quantized already: int8 or fp8 [M, K] with float32 scales [M, 1].

    Whether they were rotated as the weight was cannot be seen here; it is on the caller.

    Raises:
        TypeError: activations and weights are not of the same 8-bit dtype.
        ValueError: shapes do not fit.
        RuntimeError: fp8 on a GPU without FP8 units.
    """
    _check_q8(q_MK, scale_M1, weight_NK)
    return _product(q_MK, scale_M1, weight_NK, weight_scale_N, bias_N, gelu, dtype)


def linears_q8(products: Sequence[Operands], *, dtype: torch.dtype) -> list[Tensor]:
    """``linear_q8`` of several products that need nothing of each other, in one launch where they fit together.

    Raises: as ``linear_q8``, for each of them.
    """
    for q, scale, weight, _, _ in products:
        _check_q8(q, scale, weight)
    device = products[0][0].device
    if choose(_TOGETHER, device) == TRITON and choose(_OPERATIONS[torch.int8, False], device) == TRITON:
        from lowvram_kernels.triton_linears import MOST, linears_triton

        if 1 < len(products) <= MOST and _fit_together(products):
            record("linear_w8a8", "int8: triton, in one launch", len(products))
            return linears_triton(products, dtype=dtype)
    return [_product(*product, False, dtype) for product in products]


def _fit_together(products: Sequence[Operands]) -> bool:
    """Whether all are int8, of the same width and depth, and have biases of one dtype or none."""
    kinds = {(w.dtype, w.shape, None if bias is None else bias.dtype) for _, _, w, _, bias in products}
    return len(kinds) == 1 and products[0][2].dtype is torch.int8


def _check_q8(q_MK: Tensor, scale_M1: Tensor, weight_NK: Tensor) -> None:
    if q_MK.dtype is not weight_NK.dtype or q_MK.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise TypeError(f"activations are {q_MK.dtype}, weights {weight_NK.dtype}; expected int8 or fp8 e4m3 for both")
    if q_MK.ndim != 2 or q_MK.shape[1] != weight_NK.shape[1] or scale_M1.shape != (len(q_MK), 1):
        raise ValueError(
            f"activations {tuple(q_MK.shape)}, their scale {tuple(scale_M1.shape)} and weight {tuple(weight_NK.shape)} "
            "do not fit: expected [M, K], [M, 1] and [N, K]"
        )
    if q_MK.dtype is torch.float8_e4m3fn and not has_fp8_units(q_MK.device):
        raise RuntimeError("this GPU has no FP8 units; give linear_w8a8 the unquantized activations instead")


def _product(
    q_MK: Tensor,
    scale_M1: Tensor,
    weight_NK: Tensor,
    weight_scale_N: Tensor,
    bias_N: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    backend = choose(_OPERATIONS[q_MK.dtype, gelu], q_MK.device)
    record("linear_w8a8", _REPORTED[q_MK.dtype, backend])
    if backend == TRITON:
        from lowvram_kernels.triton_linear import linear_triton

        return linear_triton(q_MK, scale_M1, weight_NK, weight_scale_N, bias_N, gelu=gelu, dtype=dtype)
    if backend in (TORCHAO, COMFY):
        out = library_mm(backend, q_MK, scale_M1, weight_NK, weight_scale_N, bias_N, dtype)
    else:
        product = {INT_MM: int8_mm, SCALED_MM: fp8_mm, FLOAT32: wide_mm}[backend]
        out = product(q_MK, scale_M1, weight_NK, weight_scale_N, bias_N, dtype)
    return F.gelu(out, approximate="tanh") if gelu else out


def reference_w8a8(
    x_MK: Tensor,
    weight_NK: Tensor,
    weight_scale_N: Tensor,
    bias_N: Tensor | None,
    *,
    gelu: bool = False,
    group: int = 1,
    smooth_K: Tensor | None = None,
) -> Tensor:
    """The same in float64 on the quantized operands: what every kernel has to meet."""
    q, scale = reference_rows(x_MK, weight_NK.dtype, group, smooth_K)
    out = (q.double() @ weight_NK.double().t()) * scale.double() * weight_scale_N.double()
    out = out if bias_N is None else out + bias_N.double()
    return F.gelu(out, approximate="tanh") if gelu else out


def int8_mm(
    q_MK: Tensor, scale_M1: Tensor, weight_NK: Tensor, weight_scale_N: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if counts_as_cuda(q_MK.device):
        rows, columns = len(q_MK), len(weight_NK)
        product = torch._int_mm(*_padded_for_cublas(q_MK, weight_NK))[:rows, :columns]
    else:
        product = int_product(q_MK, weight_NK)
    return _epilogue(product.float().mul_(scale_M1), weight_scale_N, bias_N).to(dtype)


def library_mm(
    backend: str,
    q_MK: Tensor,
    scale_M1: Tensor,
    weight_NK: Tensor,
    weight_scale_N: Tensor,
    bias_N: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Another library's int8 product, scales and bias behind it as behind ``torch._int_mm``."""
    product = int8_product(backend, q_MK, weight_NK)
    return _epilogue(product.float().mul_(scale_M1), weight_scale_N, bias_N).to(dtype)


def _padded_for_cublas(q_MK: Tensor, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """cuBLASLt takes more than 16 rows, and depths and widths that are multiples of 8, in packed rows."""
    rows, depth = q_MK.shape
    more = -depth % 8
    q_MK = F.pad(q_MK, (0, more, 0, max(0, 32 - rows))) if more or rows < 32 else q_MK
    columns = -len(weight_NK) % 8
    weight_NK = F.pad(weight_NK, (0, more, 0, columns)) if more or columns else weight_NK
    return q_MK.contiguous(), weight_NK.contiguous().t()


def fp8_mm(
    q_MK: Tensor, scale_M1: Tensor, weight_NK: Tensor, weight_scale_N: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if counts_as_cuda(q_MK.device):
        return _fp8_rowwise(q_MK, scale_M1, weight_NK, weight_scale_N, bias_N).to(dtype)
    return _epilogue(scaled_product(q_MK, weight_NK).mul_(scale_M1), weight_scale_N, bias_N).to(dtype)


def wide_mm(
    q_MK: Tensor, scale_M1: Tensor, weight_NK: Tensor, weight_scale_N: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return _epilogue(wide_product(q_MK, weight_NK).mul_(scale_M1), weight_scale_N, bias_N).to(dtype)


def _fp8_rowwise(
    q_MK: Tensor, scale_M1: Tensor, weight_NK: Tensor, weight_scale_N: Tensor, bias_N: Tensor | None
) -> Tensor:
    """Row-wise scales come with bfloat16 output there, and with depths and widths that are multiples of 16."""
    columns, depth = weight_NK.shape
    more, wider = -depth % 16, -columns % 16
    if more or wider:
        q_MK, weight_NK = (F.pad(t.view(torch.int8), (0, more)) for t in (q_MK, weight_NK))
        weight_NK = F.pad(weight_NK, (0, 0, 0, wider)).view(torch.float8_e4m3fn)
        q_MK, weight_scale_N = q_MK.view(torch.float8_e4m3fn), F.pad(weight_scale_N, (0, wider))
        bias_N = None if bias_N is None else F.pad(bias_N, (0, wider))
    out = torch._scaled_mm(
        q_MK.contiguous(),
        weight_NK.contiguous().t(),
        scale_M1,
        weight_scale_N[None],
        bias=None if bias_N is None else bias_N.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    return out[:, :columns] if wider else out


def fp8_weight_only(x_MK: Tensor, weight_NK: Tensor, weight_scale_N: Tensor, bias_N: Tensor | None) -> Tensor:
    weight = weight_NK.to(x_MK.dtype) * weight_scale_N[:, None].to(x_MK.dtype)
    return F.linear(x_MK, weight, None if bias_N is None else bias_N.to(x_MK.dtype))


def _weight_only(x_MK: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    _say_weight_only(name_of(x_MK.device))
    record("linear_w8a8", "fp8: dequantized weight, no FP8 units")
    out = fp8_weight_only(x_MK, weight, scale, bias)
    return F.gelu(out, approximate="tanh") if gelu else out


def _epilogue(product: Tensor, weight_scale_N: Tensor, bias_N: Tensor | None) -> Tensor:
    if bias_N is None:
        return product.mul_(weight_scale_N)
    return torch.addcmul(bias_N.to(product.dtype), product, weight_scale_N, out=product)


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
