from __future__ import annotations

import pytest
import torch

from lowvram_kernels.rope import norm_rope, rotate
from lowvram_kernels.trace import trace_kernels


def rotation(tokens, head_dim):
    angle = torch.rand(tokens, head_dim // 2, dtype=torch.float64) * 6
    return angle.cos().float(), angle.sin().float(), torch.polar(torch.ones_like(angle), angle)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_against_complex_numbers_in_float64(dtype, bound):
    x, weight = torch.randn(7, 3 * 12).to(dtype), torch.randn(3 * 12)
    cos, sin, turn = rotation(7, 12)
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt() * weight
    exact = torch.view_as_complex(exact.view(7, 3, 6, 2)) * turn[:, None]
    exact = torch.view_as_real(exact).reshape(7, 3, 12)
    out = norm_rope(x, weight, 1e-6, 3, cos, sin)
    assert out.dtype is dtype
    assert (out - exact).norm() / exact.norm() < bound


def test_without_rotation_it_is_the_norm():
    x, weight = torch.randn(4, 16), torch.rand(16)
    expected = torch.nn.functional.rms_norm(x, (16,), weight, 1e-5).view(4, 2, 8)
    with trace_kernels() as counts:
        out = norm_rope(x, weight, 1e-5, 2)
    assert torch.allclose(out, expected, atol=1e-6)
    assert counts == {("norm_rope", "torch"): 1}


def test_rotation_keeps_lengths_and_turns_back():
    x = torch.randn(5, 2, 8)
    cos, sin, _ = rotation(5, 8)
    turned = rotate(x, cos, sin)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.allclose(rotate(turned, cos, -sin), x, atol=1e-6)


def test_bad_shapes_are_refused():
    x, weight, table = torch.randn(4, 16), torch.ones(16), torch.ones(4, 4)
    with pytest.raises(ValueError, match="even"):
        norm_rope(x, weight, 1e-5, 16)
    with pytest.raises(ValueError, match="expected"):
        norm_rope(x, weight[:8], 1e-5, 2)
    with pytest.raises(ValueError, match="both"):
        norm_rope(x, weight, 1e-5, 2, table, None)
    with pytest.raises(ValueError, match="both"):
        norm_rope(x, weight, 1e-5, 2, table[:3], table[:3])
