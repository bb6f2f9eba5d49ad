"""Quantization of rows: Triton against PyTorch, bit by bit."""

from __future__ import annotations

import pytest
import torch
from where import DEVICE, FP8, relative_error

from lowvram_kernels.rotation import rotated
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


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "group"),
    [
        *(((1, 2), 2), ((3, 16), 16), ((7, 216), 8), ((2, 1104), 16), ((5, 96), 32)),
        *(((3, 192), 64), ((2, 384), 128), ((4, 768), 256), ((1, 1024), 512)),
    ],
)
def test_rotated_groups_against_float64(shape, group, x_dtype):
    x = (torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]).to(DEVICE, x_dtype)
    q, scale = quantize_rows_triton(x, torch.int8, group)
    _, expected_scale = reference_rows(x, torch.int8, group)
    exact = rotated(x.double(), group)
    assert relative_error(scale, expected_scale) < 1e-6
    assert (q.double() * scale.double() - exact).abs().le(scale.double() * 0.501).all()


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "group"), [((3, 16), 1), ((7, 216), 8), ((2, 1104), 16), ((4, 768), 256), ((1, 70), 1)]
)
def test_smoothed_rows_against_float64(shape, group, factor_dtype):
    x = (torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]).to(DEVICE, torch.bfloat16)
    factors = torch.exp2(torch.arange(shape[1]) % 13 - 6.0).to(DEVICE, factor_dtype)
    q, scale = quantize_rows_triton(x, torch.int8, group, factors)
    _, expected_scale = reference_rows(x, torch.int8, group, factors)
    exact = rotated(x.double() * factors.double(), group)
    assert relative_error(scale, expected_scale) < 1e-6
    assert (q.double() * scale.double() - exact).abs().le(scale.double() * 0.501).all()


def test_rotated_rows_that_are_strided_or_not_finite():
    x = torch.randn(6, 100, device=DEVICE)[:, 20:68]
    x[1, 40], x[4, 3], x[2] = float("nan"), float("inf"), 0
    q, scale = quantize_rows_triton(x, torch.int8, 16)
    expected, expected_scale = reference_rows(x, torch.int8, 16)
    finite = [0, 2, 3, 5]
    assert relative_error(scale[finite], expected_scale[finite]) < 1e-6
    assert (q[finite].int() - expected[finite].int()).abs().max() <= 1
    assert not q[2].any()
    assert not scale[[1, 4]].isfinite().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("group", [16, 32, 64, 256])
def test_large_groups_of_zeros_and_of_what_is_not_finite(group, value):
    x = torch.randn(3, 512, device=DEVICE)
    x[0], x[1, 300] = 0, value
    q, scale = quantize_rows_triton(x, torch.int8, group)
    assert not q[0].any()
    assert scale.isfinite().flatten().tolist() == [True, False, True]
