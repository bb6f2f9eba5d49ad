from __future__ import annotations

import dataclasses

import pytest
import torch

from lowvram_kernels.ring_codec import (
    SlotLayout,
    decode_block,
    decode_keys,
    encode_block,
    reference_encode_keys,
    room_for_keys,
    rotate_block,
    values_shape,
)
from lowvram_kernels.rope import rotate

T, N, H = 30, 4, 16
LAYOUT = SlotLayout(tokens=T, heads=N, head_dim=H)


def encoded(k, v):
    layout = SlotLayout(tokens=len(k), heads=N, head_dim=H)
    block = layout.block(torch.full((layout.nbytes,), 85, dtype=torch.uint8))
    encode_block(k, v, block)
    return block


@pytest.mark.parametrize("tokens", [1, 30, 127, 128, 129, 300])
@pytest.mark.parametrize(("heads", "head_dim"), [(4, 16), (1, 2), (3, 12), (13, 128)])
def test_slot_bytes_are_those_of_the_format(tokens, heads, head_dim):
    layout, channels, tiles = (
        SlotLayout(tokens=tokens, heads=heads, head_dim=head_dim),
        heads * head_dim,
        -(-tokens // 128),
    )
    keys = tokens * (channels + 2 * heads) + 2 * channels
    assert layout.nbytes == keys + tiles * 128 * channels + 2 * tiles * channels + 2 * channels
    assert layout.key_bytes == keys
    slot = torch.arange(layout.nbytes, dtype=torch.int64).to(torch.uint8)
    block = layout.block(slot)
    parts = (block.v, block.k, block.v_sums, block.k_scale, block.k_mean, block.v_scale)
    assert torch.equal(torch.cat([part.reshape(-1).view(torch.uint8) for part in parts]), slot)
    assert block.v.data_ptr() == slot.data_ptr()
    assert (block.k.data_ptr() - slot.data_ptr()) % 16 == 0
    assert block.tokens == tokens
    assert tuple(block.v.shape) == values_shape(block.k)


def test_values_lie_in_tiles_behind_which_are_zeros_and_beside_which_are_their_sums():
    v = torch.randn(300, N, H)
    block = encoded(torch.randn(300, N, H), v)
    assert block.v.shape == (N, 3, H, 128)
    flat = block.v.permute(1, 3, 0, 2).flatten(0, 1)
    assert not flat[300:].any()
    steps = block.v_scale.double()
    assert ((flat[:300] * steps - v.double()).abs() <= 0.501 * steps).all()
    assert torch.equal(block.v_sums.int(), block.v.int().sum(-1))
    assert flat[:300].abs().amax(0).min() >= 126  # each channel has a scale of its own


def test_the_largest_sums_of_a_tile_fit():
    block = encoded(torch.zeros(256, N, H), torch.full((256, N, H), -3.0))
    assert (block.v == block.v.min()).all()
    assert torch.equal(block.v_sums.int(), block.v.int().sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_stays_within_half_a_step(dtype):
    common = 10 * torch.randn(N, H)
    k, v = (torch.randn(T, N, H) + common).to(dtype), torch.randn(T, N, H).to(dtype)
    block = encoded(k, v)
    k_out, v_out = decode_block(block, torch.float64)
    assert ((k_out - k.double()).abs() <= 0.501 * block.k_scale.double()[..., None]).all()
    assert ((v_out - v.double()).abs() <= 0.501 * block.v_scale.double()).all()
    assert block.v.abs().max() <= 127
    assert (v_out - v.double()).norm() / v.double().norm() < 0.008
    assert (k_out - k.double()).norm() / (k.double() - common).norm() < 0.02


def test_taking_out_the_mean_is_what_keeps_small_differences():
    k = torch.randn(T, N, H) + 50 * torch.randn(N, H)
    block = encoded(k, k)
    flat = dataclasses.replace(block, k_mean=torch.zeros_like(block.k_mean))
    reference_encode_keys(k, out := encoded(k, k))
    out.k_mean.zero_()
    reference_encode_keys(k, out)
    with_mean, without = (decode_keys(one, torch.float64) for one in (block, out))
    assert (with_mean - k).norm() < 0.1 * (without - k).norm()
    assert (decode_keys(flat, torch.float64) - k).norm() > 0.5 * k.norm()


def test_a_longer_slot_keeps_its_rest():
    slot = torch.full((LAYOUT.nbytes + 10,), 85, dtype=torch.uint8)
    encode_block(torch.randn(T, N, H), torch.randn(T, N, H), LAYOUT.block(slot))
    assert (slot[LAYOUT.nbytes :] == 85).all()
    assert (slot[: LAYOUT.nbytes] != 85).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_zeros_and_what_is_no_number(value):
    """A key shows it in its token and head, a value in its channel."""
    k, v = torch.zeros(3, N, H), torch.zeros(3, N, H)
    k[1, 2, 3] = v[1, 2, 3] = value
    block = encoded(k, v)
    block.k_mean.zero_()
    reference_encode_keys(k, block)
    keys, values = decode_block(block, torch.float32)
    assert not keys[1, 2].isfinite().all()
    assert not values[:, 2, 3].isfinite().any()
    keys[1, 2], values[:, 2, 3] = 0, 0
    assert not keys.any()
    assert not values.any()


def test_rotated_block_shares_its_values_and_turns_its_keys():
    block = encoded(torch.randn(T, N, H) + 2, torch.randn(T, N, H))
    angle = torch.rand(T, H // 2) * 6
    out = rotate_block(block, angle.cos(), angle.sin())
    assert (out.v is block.v, out.v_scale is block.v_scale, out.v_sums is block.v_sums) == (True, True, True)
    expected = rotate(decode_keys(block, torch.float64), angle.cos().double(), angle.sin().double())
    assert (decode_keys(out, torch.float64) - expected).norm() / expected.norm() < 0.008
    assert not torch.equal(out.k, block.k)


def test_rotated_keys_stand_where_room_is_kept():
    blocks = [encoded(torch.randn(T, N, H) + 2, torch.randn(T, N, H)) for _ in range(2)]
    angle = torch.rand(T, H // 2) * 6
    room = room_for_keys(blocks[0])
    for block in blocks:
        kept, own = (rotate_block(block, angle.cos(), angle.sin(), out) for out in (room, None))
        assert (kept.k.data_ptr(), kept.k_scale.data_ptr()) == (room.k.data_ptr(), room.k_scale.data_ptr())
        assert kept.v is block.v
        for name in ("k", "k_scale", "k_mean"):
            assert torch.equal(getattr(kept, name), getattr(own, name))


def test_bad_slots_and_shapes_are_refused():
    slot = torch.zeros(LAYOUT.nbytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match="expected contiguous uint8"):
        LAYOUT.block(slot[:-2])
    with pytest.raises(ValueError, match="expected contiguous uint8"):
        LAYOUT.block(torch.zeros(2 * LAYOUT.nbytes, dtype=torch.uint8)[::2])
    with pytest.raises(ValueError, match="even head_dim"):
        SlotLayout(tokens=1, heads=1, head_dim=3)
    with pytest.raises(ValueError, match="the block holds"):
        encode_block(torch.zeros(T, N, 8), torch.zeros(T, N, H), LAYOUT.block(slot))
    with pytest.raises(ValueError, match="for each token"):
        rotate_block(LAYOUT.block(slot), torch.ones(T, 3), torch.ones(T, 3))
