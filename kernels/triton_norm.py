"""Gate, residual, LayerNorm, modulation and quantization in one pass: a program holds one token in registers."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from lowvram_kernels.aot import Case
from lowvram_kernels.launch import launch
from lowvram_kernels.rotation import GROUP, SYLVESTER
from lowvram_kernels.rows import QMAX
from lowvram_kernels.triton_rows import (
    magnitude_bits,
    packed,
    power_of_2,
    quantize_scales,
    rotate_groups,
    row_warps,
    to_8bit,
)

Tensor = torch.Tensor

# What becomes of the row after the residual.
NOTHING, FLOATING, INT8, FP8 = (tl.constexpr(mode) for mode in range(4))


@triton.jit
def _fused_kernel(
    x,
    y,
    gate,
    gain,
    offset,
    residual,
    values,
    scale,
    stride_x,
    stride_y,
    D,
    gate_tokens,
    gain_tokens,
    offset_tokens,
    eps,
    QMAX: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_GATE: tl.constexpr,
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0)
    row = token.to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    there = column < D
    value = tl.load(x + row * stride_x + column, mask=there, other=0.0).to(tl.float32)
    if HAS_Y:
        added = tl.load(y + row * stride_y + column, mask=there, other=0.0).to(tl.float32)
        if HAS_GATE:
            added *= tl.load(gate + token // gate_tokens * D + column, mask=there, other=0.0).to(tl.float32)
        value += added
        tl.store(residual + row * D + column, value, mask=there)
    if MODE != NOTHING:
        mean = tl.sum(value, 0) / D
        centred = tl.where(there, value - mean, 0.0)
        value = centred * (1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / D + eps))
        value *= tl.load(gain + token // gain_tokens * D + column, mask=there, other=0.0).to(tl.float32)
        value += tl.load(offset + token // offset_tokens * D + column, mask=there, other=0.0).to(tl.float32)
        if MODE == FLOATING:
            tl.store(values + row * D + column, value.to(values.dtype.element_ty), mask=there)
        else:
            if GROUP > 1:
                value = rotate_groups(value, GROUP)
            row_scale, inverse = quantize_scales(tl.max(magnitude_bits(value), 0), QMAX)
            tl.store(values + row * D + column, to_8bit(value * inverse, MODE == INT8), mask=there)
            tl.store(scale + row, row_scale)


def fused_triton(
    x_LD: Tensor,
    y_LD: Tensor | None,
    gate: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    out: Tensor | None,
    group: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(residual, values, scale); without ``y`` the residual is ``x``, without ``gain`` so are the values."""
    x_LD = _packed_rows(x_LD)
    y_LD = None if y_LD is None else _packed_rows(y_LD)
    gate, gain, offset = (None if t is None else packed(t) for t in (gate, gain, offset))
    tokens, width = x_LD.shape
    target = x_LD
    if y_LD is not None:
        target = out if out is not None and out.is_contiguous() else torch.empty_like(x_LD, dtype=torch.float32)
    values, scale, mode, largest = x_LD, None, NOTHING.value, 1.0
    if gain is not None and dtype is not None:
        largest = QMAX.get(dtype, 1.0)
        values = torch.empty((tokens, width), dtype=dtype, device=x_LD.device)
        mode = {torch.int8: INT8.value, torch.float8_e4m3fn: FP8.value}.get(dtype, FLOATING.value)
        scale = torch.empty((tokens, 1), dtype=torch.float32, device=x_LD.device) if dtype in QMAX else None
    launch(
        _fused_kernel,
        (tokens,),
        x_LD,
        x_LD if y_LD is None else y_LD,
        x_LD if gate is None else gate,
        x_LD if gain is None else gain,
        x_LD if offset is None else offset,
        target,
        values,
        x_LD if scale is None else scale,
        x_LD.stride(0),
        0 if y_LD is None else y_LD.stride(0),
        width,
        *(1 if t is None else tokens // (len(t) if t.ndim == 2 else 1) for t in (gate, gain, offset)),
        eps,
        QMAX=largest,
        HAS_Y=y_LD is not None,
        HAS_GATE=gate is not None,
        MODE=mode,
        GROUP=group,
        BLOCK_D=power_of_2(width),
        num_warps=row_warps(width),
        enable_fp_fusion=False,
    )
    if out is not None and target is not out:
        target = out.copy_(target)
    return target, values, scale


def _packed_rows(x_LD: Tensor) -> Tensor:
    return x_LD if x_LD.stride(1) == 1 else x_LD.contiguous()


def aot_cases(generation: int) -> list[Case]:
    types = {"x": "*fp32", "y": "*bf16", "gate": "*fp32", "gain": "*fp32", "offset": "*fp32", "residual": "*fp32"}
    types |= dict.fromkeys(("stride_x", "stride_y", "D", "gate_tokens", "gain_tokens", "offset_tokens"), "i32:16")
    types |= {"scale": "*fp32", "eps": "fp32"}
    modes = {
        "": ("*fp32", 1.0, NOTHING, 1),
        " norm bf16": ("*bf16", 1.0, FLOATING, 1),
        " norm int8": ("*i8", 127.0, INT8, 1),
        " norm int8 rotated": ("*i8", 127.0, INT8, GROUP),
    }
    if generation >= 89:
        modes[" norm fp8"] = ("*fp8e4nv", 448.0, FP8, 1)
    weights = {"gain": "*bf16", "offset": "*bf16"}  # a norm's own, as they are stored
    kinds = [(name, {"values": values}, *rest) for name, (values, *rest) in modes.items()]
    kinds.append((" norm int8 of a bf16 weight", {"values": "*i8"} | weights, 127.0, INT8, 1))
    return [
        Case(
            name=f"add_gated{name}",
            kernel=_fused_kernel,
            types=types | own,
            constants={"QMAX": qmax, "HAS_Y": True, "HAS_GATE": True, "MODE": mode.value, "GROUP": group}
            | {"BLOCK_D": 8192},
            num_warps=row_warps(5120),
            fp_fusion=False,
        )
        for name, own, qmax, mode, group in kinds
    ]


def more_aot_cases(generation: int) -> list[Case]:
    """Groups of earlier artifacts."""
    return [
        dataclasses.replace(case, name=f"{case.name} by {SYLVESTER}", constants={**case.constants, "GROUP": SYLVESTER})
        for case in aot_cases(generation)
        if "rotated" in case.name
    ]
