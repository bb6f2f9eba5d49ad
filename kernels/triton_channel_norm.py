"""Norm over channels and SiLU in one pass: a program holds some pixels in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lowvram_kernels.aot import Case
from lowvram_kernels.channel_norm import LEAST
from lowvram_kernels.launch import launch
from lowvram_kernels.triton_rows import packed, power_of_2

Tensor = torch.Tensor

VALUES = 4096
"""Of a program."""
WARPS = 4
MOST_CHANNELS = 4096


@triton.jit
def _channel_norm_silu_kernel(
    x,
    gamma,
    out,
    rows,
    C,
    stride_x,
    stride_out,
    LEAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, channel = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    there = (row < rows)[:, None] & (channel < C)[None, :]
    at = row.to(tl.int64)[:, None]
    value = tl.load(x + at * stride_x + channel[None, :], mask=there, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(value * value, 1))
    # A NaN stays one, in every channel of its pixel.
    norm = tl.maximum(norm, LEAST, propagate_nan=tl.PropagateNan.ALL)
    factor = tl.sqrt_rn(C.to(tl.float32)) / norm
    value *= factor[:, None] * tl.load(gamma + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    value = value / (1.0 + tl.exp(-value))
    tl.store(out + at * stride_out + channel[None, :], value.to(out.dtype.element_ty), mask=there)


def channel_norm_silu_triton(x_RC: Tensor, gamma_C: Tensor, out_RC: Tensor) -> Tensor:
    """As ``channel_norm.channel_norm_silu`` has checked it.

    Raises:
        ValueError: more than 4096 channels.
    """
    rows, channels = x_RC.shape
    if channels > MOST_CHANNELS:
        raise ValueError(f"{channels} channels; the kernel takes {MOST_CHANNELS} at most")
    block = _shape(channels)
    launch(
        _channel_norm_silu_kernel,
        (-(-rows // block["BLOCK_R"]),),
        x_RC,
        packed(gamma_C),
        out_RC,
        rows,
        channels,
        x_RC.stride(0),
        out_RC.stride(0),
        LEAST=LEAST,
        **block,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return out_RC


def _shape(channels: int) -> dict[str, int]:
    wide = max(16, power_of_2(channels))
    return {"BLOCK_R": max(1, VALUES // wide), "BLOCK_C": wide}


def aot_cases(generation: int) -> list[Case]:
    # Of the published decoder: 96, 192 and 384 channels.
    return [_aot_case(channels, "*bf16", "i32:16") for channels in (96, 192, 384)]


def more_aot_cases(generation: int) -> list[Case]:
    return [_aot_case(channels, "*fp32", "i32") for channels in (8, 96, 384)]


def _aot_case(channels: int, x: str, number: str) -> Case:
    types = {"x": x, "gamma": "*bf16", "out": x, "rows": number}
    types |= dict.fromkeys(("C", "stride_x", "stride_out"), number)
    return Case(
        name=f"channel_norm_silu {channels} {x}",
        kernel=_channel_norm_silu_kernel,
        types=types,
        constants={"LEAST": LEAST, **_shape(channels)},
        num_warps=WARPS,
        fp_fusion=False,
    )
