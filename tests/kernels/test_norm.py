from __future__ import annotations

import pytest
import torch

from lowvram_kernels.norm import add_gated, add_gated_norm_rows, norm_rows
from lowvram_kernels.rotation import rotated
from lowvram_kernels.trace import trace_kernels

L, D, EPS = 6, 40, 1e-6


def exact_norm(x, gain, offset):
    x = x.double()
    gain, offset = (v.double().repeat_interleave(L // len(v), 0) if v.ndim == 2 else v.double() for v in (gain, offset))
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + EPS).sqrt() * gain + offset


@pytest.mark.parametrize("groups", [(), (1,), (3,)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_norm_against_float64(groups, dtype, bound):
    x, gain, offset = torch.randn(L, D) * 3 + 2, torch.randn(*groups, D), torch.randn(*groups, D)
    values, scale = norm_rows(x, gain, offset, eps=EPS, dtype=dtype)
    exact = exact_norm(x, gain, offset)
    assert scale is None
    assert values.dtype is dtype
    assert (values - exact).norm() / exact.norm() < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.int8, 0.015), (torch.float8_e4m3fn, 0.04)])
def test_quantized_norm_against_float64(dtype, bound):
    x, gain, offset = torch.randn(L, D), torch.randn(D), torch.randn(D)
    values, scale = norm_rows(x, gain, offset, eps=EPS, dtype=dtype)
    exact = exact_norm(x, gain, offset)
    assert values.dtype is dtype
    assert 0 < (values.double() * scale - exact).norm() / exact.norm() < bound


def test_rotated_norm_against_float64():
    x, gain, offset = torch.randn(L, 48), torch.randn(48), torch.randn(48)
    values, scale = norm_rows(x, gain, offset, eps=EPS, dtype=torch.int8, group=16)
    exact = rotated(exact_norm(x, gain, offset), 16)
    assert ((values.double() * scale - exact).abs() <= 0.501 * scale).all()


@pytest.mark.parametrize("gate", [None, torch.randn(D), torch.randn(2, D)])
def test_gate_and_residual(gate):
    x, y = torch.randn(L, D), torch.randn(L, D).bfloat16()
    full = 1 if gate is None else gate if gate.ndim == 1 else gate.repeat_interleave(L // 2, 0)
    expected = x + full * y.float()
    assert torch.equal(add_gated(x, y, gate), expected)
    assert add_gated(x, y, gate, out=x) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize(("group", "kernel"), [(1, "int8: torch"), (8, "int8 rotated by 8: torch")])
def test_both_are_one_after_the_other(group, kernel):
    x, y, gate, gain, offset = torch.randn(L, D), torch.randn(L, D), torch.randn(D), torch.randn(D), torch.randn(D)
    wanted = {"eps": EPS, "dtype": torch.int8, "group": group}
    with trace_kernels() as counts:
        residual, values, scale = add_gated_norm_rows(x, y, gate, gain, offset, **wanted)
    expected, expected_scale = norm_rows(add_gated(x, y, gate), gain, offset, **wanted)
    assert torch.equal(residual, add_gated(x, y, gate))
    assert torch.equal(values, expected)
    assert torch.equal(scale, expected_scale)
    assert counts == {("add_gated_norm_rows", kernel): 1}


def test_no_rows():
    gain = torch.ones(D)
    values, scale = norm_rows(torch.empty(0, D), gain, gain, eps=EPS, dtype=torch.int8)
    assert values.shape == (0, D)
    assert scale.shape == (0, 1)


def test_bad_operands_are_refused():
    x, gain = torch.randn(L, D), torch.ones(D)
    with pytest.raises(ValueError, match="gain is"):
        norm_rows(x, gain[:5], gain, eps=EPS, dtype=torch.int8)
    with pytest.raises(ValueError, match="offset is"):
        norm_rows(x, gain, torch.ones(4, D), eps=EPS, dtype=torch.int8)
    with pytest.raises(ValueError, match="for both"):
        add_gated(x, x[:3], None)
    with pytest.raises(ValueError, match="divides 40"):
        norm_rows(x, gain, gain, eps=EPS, dtype=torch.int8, group=16)
    with pytest.raises(ValueError, match="int8 rows only"):
        norm_rows(x, gain, gain, eps=EPS, dtype=torch.bfloat16, group=8)
    with pytest.raises(TypeError, match="known are"):
        norm_rows(x, gain, gain, eps=EPS, dtype=torch.int16)
