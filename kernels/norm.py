"""Norms between two matrix products of a layer: gate and residual, LayerNorm, modulation, quantization.

Each is one pass: every activation is read once and written once. Order of preference: Triton on CUDA from sm_80 on
(fp8 results from sm_89 on), otherwise PyTorch. Shapes: L tokens, D width, F groups of L / F tokens each (latent frames)
that share a gate or a modulation; a vector [D] is shared by all.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lowvram_kernels.choices import TRITON, choose, rows_operation
from lowvram_kernels.rotation import check_group
from lowvram_kernels.rows import QMAX, kind_name, reference_rows
from lowvram_kernels.trace import record

Tensor = torch.Tensor


def norm_rows(
    x_LD: Tensor, gain: Tensor, offset: Tensor, *, eps: float, dtype: torch.dtype, group: int = 1
) -> tuple[Tensor, Tensor | None]:
    """LayerNorm(x) * gain + offset, rounded to ``dtype``: (values [L, D], scale float32 [L, 1]; None if not 8 bits).

    ``gain`` is the whole factor (1 + scale of a modulation, or a norm's weight), [D] or [F, D]; so is ``offset``. The
    8-bit values are what ``quantize_rows`` gives for the float32 result and the same ``group``, up to a step where
    sums round differently.

    Raises:
        TypeError: ``dtype`` is neither a floating point type nor int8.
        ValueError: shapes do not fit, or D cannot be rotated in such groups.
    """
    _check(x_LD, None, gain=gain, offset=offset, dtype=dtype, group=group)
    if _takes_triton(rows_operation("norm_rows", dtype, group), x_LD):
        from lowvram_kernels.triton_norm import fused_triton

        record("norm_rows", f"{_name(dtype, group)}: triton")
        return fused_triton(x_LD, None, None, gain, offset, eps, dtype, None, group)[1:]
    record("norm_rows", f"{_name(dtype, group)}: torch")
    return reference_norm_rows(x_LD, gain, offset, eps=eps, dtype=dtype, group=group)


def add_gated(x_LD: Tensor, y_LD: Tensor, gate: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """x + gate * y in float32 (gate None: 1), into ``out`` where one is given, which may be ``x`` itself.

    Raises:
        ValueError: shapes do not fit.
    """
    _check(x_LD, y_LD, gate=gate)
    if _takes_triton("add_gated", x_LD):
        from lowvram_kernels.triton_norm import fused_triton

        record("add_gated", "triton")
        return fused_triton(x_LD, y_LD, gate, None, None, 0.0, None, out)[0]
    record("add_gated", "torch")
    return reference_add_gated(x_LD, y_LD, gate, out)


def add_gated_norm_rows(
    x_LD: Tensor,
    y_LD: Tensor,
    gate: Tensor | None,
    gain: Tensor,
    offset: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    group: int = 1,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both in one pass: the new residual x + gate * y, then ``norm_rows`` of it as (residual, values, scale)."""
    _check(x_LD, y_LD, gate=gate, gain=gain, offset=offset, dtype=dtype, group=group)
    if _takes_triton(rows_operation("add_gated_norm_rows", dtype, group), x_LD):
        from lowvram_kernels.triton_norm import fused_triton

        record("add_gated_norm_rows", f"{_name(dtype, group)}: triton")
        return fused_triton(x_LD, y_LD, gate, gain, offset, eps, dtype, out, group)
    record("add_gated_norm_rows", f"{_name(dtype, group)}: torch")
    residual = reference_add_gated(x_LD, y_LD, gate, out)
    return (residual, *reference_norm_rows(residual, gain, offset, eps=eps, dtype=dtype, group=group))


def reference_norm_rows(
    x_LD: Tensor, gain: Tensor, offset: Tensor, *, eps: float, dtype: torch.dtype, group: int = 1
) -> tuple[Tensor, Tensor | None]:
    x = F.layer_norm(x_LD.to(torch.promote_types(x_LD.dtype, torch.float32)), x_LD.shape[1:], eps=eps)
    x = x * _rows_of(gain, len(x)) + _rows_of(offset, len(x))
    return reference_rows(x, dtype, group) if dtype in QMAX else (x.to(dtype), None)


def reference_add_gated(x_LD: Tensor, y_LD: Tensor, gate: Tensor | None, out: Tensor | None = None) -> Tensor:
    y = y_LD.to(torch.promote_types(x_LD.dtype, torch.float32))
    return torch.add(x_LD, y if gate is None else y * _rows_of(gate, len(y)), out=out)


def _rows_of(vectors: Tensor, rows: int) -> Tensor:
    """[D] as it is, [F, D] repeated to [rows, D]; at least float32."""
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return vectors if vectors.ndim == 1 else vectors.repeat_interleave(rows // len(vectors), dim=0)


def _takes_triton(operation: str, x: Tensor) -> bool:
    return bool(x.numel()) and x.dtype is not torch.float64 and choose(operation, x.device) == TRITON


def _name(dtype: torch.dtype, group: int) -> str:
    return kind_name(dtype, group) if dtype in QMAX else str(dtype).removeprefix("torch.")


def _check(
    x: Tensor, y: Tensor | None, *, dtype: torch.dtype = torch.float32, group: int = 1, **vectors: Tensor | None
) -> None:
    if not dtype.is_floating_point and dtype is not torch.int8:
        raise TypeError(f"rows were to be rounded to {dtype}; known are int8, float8_e4m3fn and wider floating point")
    if x.ndim != 2 or (y is not None and y.shape != x.shape):
        raise ValueError(f"x {tuple(x.shape)}, y {None if y is None else tuple(y.shape)}: expected [L, D] for both")
    check_group(group, x.shape[1], dtype)
    for name, vector in vectors.items():
        if vector is None:
            continue
        groups = len(vector) if vector.ndim == 2 else 1
        if vector.ndim not in (1, 2) or vector.shape[-1] != x.shape[1] or not groups or len(x) % groups:
            raise ValueError(
                f"{name} is {tuple(vector.shape)} for x {tuple(x.shape)}; expected [D], or [F, D] with F a divisor of L"
            )
