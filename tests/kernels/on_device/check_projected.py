"""From a layer's projections to what its queries attended: against float64 and against the parts it is made of."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from where import DEVICE, relative_error

from lowvram_kernels.projected import Projected, TurnedSink
from lowvram_kernels.ring_attention import reference_ring_attention, ring_attention, stepwise_attention
from lowvram_kernels.ring_codec import (
    KVBlock,
    SlotLayout,
    decode_block,
    decode_keys,
    encode_block,
    room_for_keys,
    rotate_block,
)
from lowvram_kernels.rope import Projection, reference_norm_rope, rotate
from lowvram_kernels.triton_attention import Tile
from lowvram_kernels.triton_means import SUM_TOKENS
from lowvram_kernels.triton_projected import attend_projected_triton

EPS = 1e-6
SMALL = Tile(32, 4, 2)
# Tokens of the block, of the ring's slots and of the sink; heads and their width. The block is the slot of its tokens.
SIZES = [
    (5, (5,), 3, 1, 16),
    (SUM_TOKENS, (20, SUM_TOKENS), 2 * SUM_TOKENS, 3, 32),
    (SUM_TOKENS + 5, (7, SUM_TOKENS + 5), SUM_TOKENS + 1, 2, 48),
    (6, (6, 12, 33, 6), 9, 5, 128),
    (8, (8,), 1, 4, 12),
    (130, (130, 128), 3, 1, 16),
]
CASES = [*((sizes, torch.float32) for sizes in SIZES), (SIZES[2], torch.bfloat16), (SIZES[3], torch.bfloat16)]


def empty(tokens: int, heads: int, head_dim: int) -> KVBlock:
    layout = SlotLayout(tokens=tokens, heads=heads, head_dim=head_dim)
    # Longer than a slot has to be, and not zero: what is not written shows.
    return layout.block(torch.full((layout.nbytes + 48,), 85, dtype=torch.uint8, device=DEVICE))


def random_block(tokens: int, heads: int, head_dim: int) -> KVBlock:
    block = empty(tokens, heads, head_dim)
    k, v = (torch.randn(tokens, heads, head_dim, device=DEVICE) for _ in range(2))
    encode_block(k + torch.randn(heads, head_dim, device=DEVICE), v, block)
    return block


def rotation(tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(tokens, head_dim // 2, device=DEVICE) * 6
    return angle.cos(), angle.sin()


def projection(tokens: int, width: int, dtype: torch.dtype, shift: float) -> Projection:
    """Rows are not packed, and what stands between them is not finite."""
    x = torch.full((tokens, width + 8), float("nan"), device=DEVICE)
    x[:, :width] = torch.randn(tokens, width, device=DEVICE) + shift
    return Projection(x.to(dtype)[:, :width], (torch.randn(width, device=DEVICE) * 2).to(dtype), EPS)


def operands(sizes, dtype=torch.float32):
    """(own, slot, blocks, sink): keys with a common vector behind their norm, values of heads that are not packed."""
    tokens, slots, sink_tokens, heads, head_dim = sizes
    slot, width = slots.index(tokens), heads * head_dim
    blocks = [random_block(count, heads, head_dim) for count in slots]
    blocks[slot] = empty(tokens, heads, head_dim)
    v = torch.randn(tokens, heads, 2, head_dim, device=DEVICE).to(dtype)[:, :, 1]
    q, k = (projection(tokens, width, dtype, shift) for shift in (0.0, 1.0))
    sink = TurnedSink(random_block(sink_tokens, heads, head_dim), *rotation(sink_tokens, head_dim))
    return Projected(q, k, v, *rotation(tokens, head_dim)), slot, blocks, sink


def exact_keys(own: Projected, heads: int) -> torch.Tensor:
    return reference_norm_rope(own.k.x_TD.double(), own.k.weight_D, EPS, heads, own.cos_TP, own.sin_TP)


def within_half_a_step(got: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor) -> bool:
    return bool(((got - exact.double()).abs() <= 0.502 * scale.double()[..., None]).all())


@pytest.mark.parametrize(("sizes", "dtype"), CASES)
def test_what_is_kept_is_within_half_a_step_and_what_is_attended_meets_float64(sizes, dtype):
    own, slot, blocks, sink = operands(sizes, dtype)
    heads, eps = sizes[3], torch.finfo(torch.bfloat16).eps
    others = {index: decode_block(block, torch.float64) for index, block in enumerate(blocks) if index != slot}
    room = room_for_keys(sink.block)
    for part in (room.k, room.k_scale, room.k_mean):
        part.fill_(85)
    out = attend_projected_triton(own, slot, blocks, dataclasses.replace(sink, room=room), SMALL)
    assert (out.shape, out.dtype) == (own.v_TNH.shape, dtype)
    written = blocks[slot]
    keys, values = decode_block(written, torch.float64)
    exact = exact_keys(own, heads)
    assert within_half_a_step(keys, exact, written.k_scale)
    assert ((values - own.v_TNH.double()).abs() <= 0.502 * written.v_scale.double()).all()
    assert relative_error(written.k_mean, exact.mean(0)) < eps
    turned = rotate(decode_keys(sink.block, torch.float64), sink.cos_TP.double(), sink.sin_TP.double())
    assert within_half_a_step(decode_keys(room, torch.float64), turned, room.k_scale)
    assert relative_error(room.k_mean, turned.mean(0)) < 2 * eps
    for index, before in others.items():
        assert all(torch.equal(*pair) for pair in zip(decode_block(blocks[index], torch.float64), before, strict=True))
    assert_attended(out, own, blocks, sink, heads)


def assert_attended(out: torch.Tensor, own: Projected, blocks: list[KVBlock], sink: TurnedSink, heads: int) -> None:
    """Over what the blocks hold, and over the sink with its keys in 8 bits once more: as the kernel's own steps have it
    but for weights and queries whose rounding was close, and float64 but for its 8 bits."""
    q = reference_norm_rope(own.q.x_TD.double(), own.q.weight_D, EPS, heads, own.cos_TP, own.sin_TP)
    everything = [*blocks, rotate_block(sink.block, sink.cos_TP, sink.sin_TP)]
    close = 0.01 if out.dtype is torch.float32 else 0.015
    assert relative_error(out, stepwise_attention(q.float(), everything)) < close
    assert relative_error(out, reference_ring_attention(q, everything)) < 0.06


def test_equals_the_parts_but_for_roundings():
    own, slot, blocks, sink = operands((24, (24, 20), 9, 3, 32))
    parts = empty(24, 3, 32)
    out = attend_projected_triton(own, slot, blocks, sink, SMALL)
    encode_block(exact_keys(own, 3).float(), own.v_TNH, parts)
    written = blocks[slot]
    assert torch.equal(written.v, parts.v)
    assert torch.equal(written.v_sums, parts.v_sums)
    assert torch.equal(written.v_scale, parts.v_scale)
    # One step of bfloat16: Triton's interpreter cuts a float32 off where a card rounds it to the nearest.
    last_bit = parts.k_mean.float().abs() * torch.finfo(torch.bfloat16).eps
    assert ((written.k_mean.float() - parts.k_mean.float()).abs() <= last_bit).all()
    apart = (written.k.int() - parts.k.int()).abs()
    assert apart.max() <= 3  # a mean's last bit, or a scale's, moves a head's keys
    assert (apart <= 1).float().mean() > 0.99
    assert (apart == 0).float().mean() > (0.9 if DEVICE.type == "cuda" else 0.8)
    q = reference_norm_rope(own.q.x_TD, own.q.weight_D, EPS, 3, own.cos_TP, own.sin_TP)
    turned = rotate_block(sink.block, sink.cos_TP, sink.sin_TP)
    assert relative_error(out, ring_attention(q, [parts, blocks[1], turned])) < 0.04


def test_a_slot_whose_parts_are_off_multiples_of_16_bytes():
    """3 tokens of 1 head: scales and means stand where they can."""
    own, slot, blocks, sink = operands((3, (3, 5), 7, 1, 16))
    assert blocks[0].k_mean.data_ptr() % 16
    out = attend_projected_triton(own, slot, blocks, sink, SMALL)
    assert_attended(out, own, blocks, sink, 1)


@pytest.mark.parametrize("which", ["q", "k"])
def test_a_token_that_is_not_finite_shows(which):
    own, slot, blocks, sink = operands((9, (9, 7), 5, 2, 16))
    x = getattr(own, which)
    x.x_TD[2, 3] = float("nan")
    out = attend_projected_triton(own, slot, blocks, sink, SMALL)
    if which == "k":
        assert decode_block(blocks[slot], torch.float32)[0][2].isnan().all()
        assert out.isnan().all()
    else:
        assert out[2].isnan().all()
        assert out[[0, 1, *range(3, 9)]].isfinite().all()
