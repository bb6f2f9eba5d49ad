"""A block's keys from their projection into the ring, with its values: against float64 and against the parts."""

from __future__ import annotations

import pytest
import torch
from where import DEVICE, relative_error

from lowvram_kernels.ring_codec import KVBlock, SlotLayout, decode_block, encode_block
from lowvram_kernels.rope import reference_norm_rope
from lowvram_kernels.triton_keys import SUM_TOKENS, encode_projected_triton

EPS = 1e-6


def empty(tokens, heads, head_dim) -> KVBlock:
    layout = SlotLayout(tokens=tokens, heads=heads, head_dim=head_dim)
    return layout.block(torch.full((layout.nbytes,), 85, dtype=torch.uint8, device=DEVICE))


def operands(tokens, heads, head_dim, dtype):
    """Keys with a common vector behind the norm, as its weight gives them; rows and heads are not packed."""
    width = heads * head_dim
    k = (torch.randn(tokens, width + 8, device=DEVICE) + 1).to(dtype)[:, :width]
    v = torch.randn(tokens, heads, 2, head_dim, device=DEVICE).to(dtype)[:, :, 1]
    angle = torch.rand(tokens, head_dim // 2, device=DEVICE)
    return k, v, (torch.randn(width, device=DEVICE) * 3).to(dtype), EPS, angle.cos(), angle.sin()


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"), [(1, 1, 2), (SUM_TOKENS, 3, 12), (2 * SUM_TOKENS + 5, 4, 16), (7, 5, 128)]
)
def test_every_key_and_value_is_within_half_a_step(tokens, heads, head_dim, dtype, rope):
    k, v, weight, eps, *table = operands(tokens, heads, head_dim, dtype)
    table = table if rope else (None, None)
    out = empty(tokens, heads, head_dim)
    encode_projected_triton(k, v, weight, eps, *table, out)
    exact = reference_norm_rope(k.double(), weight, eps, heads, *table)
    decoded = decode_block(out, torch.float64)
    for got, wanted, scale in zip(decoded, (exact, v), (out.k_scale, out.v_scale), strict=True):
        assert ((got - wanted.double()).abs() <= 0.502 * scale.double()[..., None]).all()
    assert relative_error(out.k_mean, exact.mean(0)) < torch.finfo(torch.bfloat16).eps


def test_equals_norm_rope_and_encode_block_but_for_roundings():
    given = operands(40, 3, 32, torch.float32)
    k, v, weight, eps, cos, sin = given
    out, parts = empty(40, 3, 32), empty(40, 3, 32)
    encode_projected_triton(*given, out)
    encode_block(reference_norm_rope(k, weight, eps, 3, cos, sin), v, parts)
    assert torch.equal(out.v, parts.v)
    assert torch.equal(out.v_scale, parts.v_scale)
    # One step of bfloat16: Triton's interpreter cuts a float32 off where a card rounds it to the nearest.
    last_bit = parts.k_mean.float().abs() * torch.finfo(torch.bfloat16).eps
    assert ((out.k_mean.float() - parts.k_mean.float()).abs() <= last_bit).all()
    apart = (out.k.int() - parts.k.int()).abs()
    assert apart.max() <= 3  # a mean's last bit, or a scale's, moves a head's keys
    assert (apart <= 1).float().mean() > 0.99
    assert (apart == 0).float().mean() > (0.9 if DEVICE.type == "cuda" else 0.8)


def test_a_token_that_is_not_finite_shows():
    k, *others = operands(5, 2, 16, torch.float32)
    k[2, 3] = float("nan")
    out = empty(5, 2, 16)
    encode_projected_triton(k, *others, out)
    assert decode_block(out, torch.float32)[0][2].isnan().all()
