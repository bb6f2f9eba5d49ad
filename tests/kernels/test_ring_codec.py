from __future__ import annotations

import pytest
import torch

from lowvram_kernels.ring_codec import (
    SlotLayout,
    decode_block,
    decode_keys,
    encode_block,
    room_for_keys,
    rotate_block,
)
from lowvram_kernels.rope import rotate

T, N, H = 30, 4, 16
LAYOUT = SlotLayout(tokens=T, heads=N, head_dim=H)


def encoded(k, v):
    layout = SlotLayout(tokens=len(k), heads=N, head_dim=H)
    block = layout.block(torch.full((layout.nbytes,), 85, dtype=torch.uint8))
    encode_block(k, v, block)
    return block


def test_slot_bytes_are_those_of_the_format():
    assert LAYOUT.nbytes == 2 * T * N * H + 2 * 2 * T * N + 2 * N * H
    slot = torch.arange(LAYOUT.nbytes, dtype=torch.int64).to(torch.uint8)
    block = LAYOUT.block(slot)
    joined = torch.cat(
        [part.reshape(-1).view(torch.uint8) for part in (block.k, block.v, block.k_scale, block.v_scale, block.k_mean)]
    )
    assert torch.equal(joined, slot)
    assert block.k.data_ptr() == slot.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_stays_within_half_a_step(dtype):
    common = 10 * torch.randn(N, H)
    k, v = (torch.randn(T, N, H) + common).to(dtype), torch.randn(T, N, H).to(dtype)
    block = encoded(k, v)
    k_out, v_out = decode_block(block, torch.float64)
    assert ((k_out - k.double()).abs() <= 0.501 * block.k_scale.double()[..., None]).all()
    assert ((v_out - v.double()).abs() <= 0.501 * block.v_scale.double()[..., None]).all()
    assert block.v.abs().max() <= 127
    assert (v_out - v.double()).norm() / v.double().norm() < 0.008
    assert (k_out - k.double()).norm() / (k.double() - common).norm() < 0.02


def test_taking_out_the_mean_is_what_keeps_small_differences():
    k = torch.randn(T, N, H) + 50 * torch.randn(N, H)
    block = encoded(k, k)
    _, without = decode_block(block, torch.float64)
    with_mean = decode_keys(block, torch.float64)
    assert (with_mean - k).norm() < 0.1 * (without - k).norm()


def test_a_longer_slot_keeps_its_rest():
    slot = torch.full((LAYOUT.nbytes + 10,), 85, dtype=torch.uint8)
    encode_block(torch.randn(T, N, H), torch.randn(T, N, H), LAYOUT.block(slot))
    assert (slot[LAYOUT.nbytes :] == 85).all()
    assert (slot[: LAYOUT.nbytes] != 85).any()


def test_zeros_and_nan():
    k, v = torch.zeros(3, N, H), torch.zeros(3, N, H)
    v[1, 2, 3] = float("nan")
    _, out = decode_block(encoded(k, v), torch.float32)
    assert out[1, 2].isnan().all()
    out[1, 2] = 0
    assert not out.any()


def test_rotated_block_shares_its_values_and_turns_its_keys():
    block = encoded(torch.randn(T, N, H) + 2, torch.randn(T, N, H))
    angle = torch.rand(T, H // 2) * 6
    out = rotate_block(block, angle.cos(), angle.sin())
    assert out.v is block.v
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
