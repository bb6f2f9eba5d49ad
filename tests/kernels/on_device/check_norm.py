"""Gate, residual, LayerNorm, modulation and quantization in one pass, against float64."""

from __future__ import annotations

import pytest
import torch
from where import DEVICE, FP8, relative_error

from lowvram_kernels.norm import reference_add_gated, reference_norm_rows
from lowvram_kernels.rotation import rotated
from lowvram_kernels.triton_norm import fused_triton

EPS = 1e-6


def vectors(groups, width):
    shape = (width,) if groups is None else (groups, width)
    return (torch.randn(shape, device=DEVICE) for _ in range(3))


@pytest.mark.parametrize("groups", [None, 1, 3])
@pytest.mark.parametrize(("tokens", "width"), [(3, 1), (6, 80), (9, 257), (3, 1100)])
def test_all_in_one(tokens, width, groups):
    x, y = torch.randn(tokens, width, device=DEVICE) * 3 + 1, torch.randn(tokens, width, device=DEVICE)
    gate, gain, offset = vectors(groups, width)
    residual, values, scale = fused_triton(x, y, gate, gain, offset, EPS, torch.float32, None)
    expected = reference_add_gated(x.double(), y, gate)
    assert scale is None
    assert relative_error(residual, expected) < 1e-6
    # Behind a large offset the norm's difference cancels what both share.
    normed, _ = reference_norm_rows(residual.double(), gain, offset, eps=EPS, dtype=torch.float64)
    assert relative_error(values, normed) < 2e-6


@pytest.mark.parametrize("dtype", [torch.int8, *FP8])
def test_quantized_rows(dtype):
    x, y = torch.randn(7, 300, device=DEVICE), torch.randn(7, 300, device=DEVICE).bfloat16()
    gate, gain, offset = vectors(None, 300)
    residual, values, scale = fused_triton(x, y, gate, gain, offset, EPS, dtype, None)
    exact, _ = reference_norm_rows(residual.double(), gain, offset, eps=EPS, dtype=torch.float64)
    _, expected = reference_norm_rows(residual, gain, offset, eps=EPS, dtype=dtype)
    assert relative_error(scale, expected) < 1e-6
    bound = (
        0.015 if dtype is torch.int8 else 0.03 if DEVICE.type == "cuda" else 0.2
    )  # see check_rows on the interpreter
    assert 0 < relative_error(values.double() * scale.double(), exact) < bound
    if dtype is torch.int8:
        assert (values.double() * scale.double() - exact).abs().le(scale.double() * 0.501).all()


def test_norm_alone_leaves_the_residual():
    x = torch.randn(5, 64, device=DEVICE)
    before = x.clone()
    _, gain, offset = vectors(None, 64)
    residual, values, _ = fused_triton(x, None, None, gain, offset, EPS, torch.bfloat16, None)
    assert values.dtype is torch.bfloat16
    assert residual is x
    assert torch.equal(x, before)
    expected, _ = reference_norm_rows(x.double(), gain, offset, eps=EPS, dtype=torch.float64)
    assert relative_error(values, expected) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("gated", [False, True])
def test_residual_in_place_from_strided_operands(gated):
    wide = torch.randn(6, 96, device=DEVICE)
    y = torch.randn(6, 200, device=DEVICE)[:, 40:136]
    gate = torch.randn(2, 96, device=DEVICE) if gated else None
    expected = reference_add_gated(wide.double(), y, gate)
    residual, values, scale = fused_triton(wide, y, gate, None, None, 0.0, None, wide)
    assert residual is wide
    assert values is wide
    assert scale is None
    assert relative_error(wide, expected) < 1e-6


def test_residual_into_a_strided_target():
    x, y = torch.randn(4, 32, device=DEVICE), torch.randn(4, 32, device=DEVICE)
    target = torch.zeros(32, 4, device=DEVICE).t()
    fused_triton(x, y, None, None, None, 0.0, None, target)
    assert torch.equal(target, x + y)


def test_a_row_with_nan_shows():
    x = torch.randn(3, 40, device=DEVICE)
    x[1, 5] = float("nan")
    one = torch.ones(40, device=DEVICE)
    _, _, scale = fused_triton(x, None, None, one, one, EPS, torch.int8, None)
    assert scale[1].isnan().all()
    assert scale[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("width", "group"), [(16, 16), (80, 16), (216, 8), (1104, 16), (192, 64), (384, 128), (768, 256)]
)
def test_rotated_rows(width, group):
    x, y = torch.randn(6, width, device=DEVICE), torch.randn(6, width, device=DEVICE).bfloat16()
    gate, gain, offset = vectors(3, width)
    residual, values, scale = fused_triton(x, y, gate, gain, offset, EPS, torch.int8, None, group)
    normed, _ = reference_norm_rows(residual.double(), gain, offset, eps=EPS, dtype=torch.float64)
    _, expected = reference_norm_rows(residual, gain, offset, eps=EPS, dtype=torch.int8, group=group)
    assert relative_error(scale, expected) < 2e-6
    assert (values.double() * scale.double() - rotated(normed, group)).abs().le(scale.double() * 0.501).all()
