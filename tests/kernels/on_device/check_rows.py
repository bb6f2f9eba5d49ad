"""Quantization of rows: Triton against PyTorch, bit by bit."""

from __future__ import annotations

import pytest
import torch
from where import DEVICE, FP8

from lowvram_kernels.rows import reference_rows
from lowvram_kernels.triton_rows import quantize_rows_triton

SHAPES = [(1, 1), (3, 80), (7, 257), (2, 1100)]


@pytest.mark.parametrize("dtype", [torch.int8, *FP8])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape, x_dtype, dtype):
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    if dtype is torch.float8_e4m3fn and DEVICE.type == "cpu":
        # The interpreter's conversion to fp8 loses the carry of a rounding: only numbers that need none.
        x = (x / x.abs().amax(1, keepdim=True) * 200).to(dtype).float()
        x[:, 0] = 448.0
    x = x.to(DEVICE, x_dtype)
    q, scale = quantize_rows_triton(x, dtype)
    expected, expected_scale = reference_rows(x, dtype)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q.float(), expected.float())


@pytest.mark.parametrize("make", [lambda x: x[:, 4:36], lambda x: x.t()[:16], lambda x: x[::2]])
def test_strided_rows(make):
    x = make(torch.randn(32, 48, device=DEVICE))
    q, scale = quantize_rows_triton(x, torch.int8)
    expected, expected_scale = reference_rows(x, torch.int8)
    assert torch.equal(q, expected)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("dtype", [torch.int8, *FP8])
def test_zeros_nan_and_infinity(dtype):
    x = torch.randn(5, 40, device=DEVICE)
    x[0] = 0
    x[1, 7], x[2, 39], x[3, 0] = float("nan"), float("inf"), float("-inf")
    q, scale = quantize_rows_triton(x, dtype)
    assert not q[0].float().any()
    assert scale[0].item() > 0
    assert not scale[1:4].isfinite().any()
    assert scale[4].isfinite().all()
