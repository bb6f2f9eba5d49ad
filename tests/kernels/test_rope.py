from __future__ import annotations

import pytest
import torch

from lowvram_kernels import rope
from lowvram_kernels.choices import TRITON
from lowvram_kernels.rope import Projection, norm_both, norm_rope, rotate
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


F32, BF16 = torch.float32, torch.bfloat16
# Tokens, width, dtype of rows and of the weight, of queries and of keys; whether one launch can take both.
BOTH = [
    ((5, 16, F32, F32), (3, 16, F32, F32), True),
    ((1, 16, BF16, BF16), (9, 16, BF16, BF16), True),
    ((0, 16, F32, F32), (3, 16, F32, F32), False),
    ((5, 16, F32, F32), (0, 16, F32, F32), False),
    ((5, 16, F32, F32), (3, 16, BF16, F32), False),
    ((5, 16, BF16, F32), (3, 16, BF16, BF16), False),
    ((5, 16, F32, F32), (3, 24, F32, F32), False),
]


def projections(*kinds) -> list[Projection]:
    return [
        Projection(torch.randn(tokens, width).to(dtype), torch.randn(width).to(weight), eps)
        for (tokens, width, dtype, weight), eps in zip(kinds, (1e-6, 1e-3), strict=True)
    ]


@pytest.mark.parametrize(("first", "second", "together"), BOTH)
def test_queries_and_keys_are_normed_as_each_alone_and_together_where_they_fit(first, second, together, monkeypatch):
    two = projections(first, second)
    with trace_kernels() as counts:
        outs = norm_both(*two, 2)
    for out, one in zip(outs, two, strict=True):
        assert torch.equal(out, norm_rope(one.x_TD, one.weight_D, one.eps, 2))
    assert counts == {("norm_rope", "torch"): 2}
    pytest.importorskip("triton", reason="triton is not installed: there is no launch for both")
    from lowvram_kernels import triton_rope

    launches = []
    monkeypatch.setattr(rope, "choose", lambda *_: TRITON)
    monkeypatch.setattr(triton_rope, "norm_both_triton", lambda *_: launches.append("both") or outs)
    monkeypatch.setattr(triton_rope, "norm_rope_triton", lambda *_: launches.append("alone"))
    norm_both(*two, 2)
    assert launches == (["both"] if together else ["alone"] * sum(len(one.x_TD) > 0 for one in two))


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
    with pytest.raises(ValueError, match="expected"):
        norm_both(Projection(x, weight, 1e-5), Projection(x, weight[:8], 1e-5), 2)
