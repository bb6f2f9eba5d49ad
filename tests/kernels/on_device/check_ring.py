"""RMSNorm with RoPE, the codec of keys and values, and attention over encoded blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from where import DEVICE, relative_error

from lowvram_kernels.holding import holding
from lowvram_kernels.ring_attention import reference_ring_attention, stepwise_attention
from lowvram_kernels.ring_codec import (
    KVBlock,
    SlotLayout,
    decode_block,
    decode_keys,
    encode_block,
    reference_encode_keys,
    reference_encode_values,
    room_for_keys,
    rotate_block,
    set_value_scales,
)
from lowvram_kernels.rope import Projection, reference_norm_rope, rotate
from lowvram_kernels.triton_attention import TILES, Tile, ring_attention_triton
from lowvram_kernels.triton_rope import encode_keys_triton, norm_both_triton, norm_rope_triton, rotated_keys_triton
from lowvram_kernels.triton_values import encode_values_triton

SMALL = Tile(32, 4, 2)


def rotation(tokens, head_dim):
    angle = torch.rand(tokens, head_dim // 2, device=DEVICE) * 6
    return angle.cos(), angle.sin()


def block(tokens, heads, head_dim, offset=1.0):
    """A random block in a slot; ``offset`` is what all keys of a head have in common."""
    layout = SlotLayout(tokens=tokens, heads=heads, head_dim=head_dim)
    out = layout.block(torch.full((layout.nbytes + 16,), 85, dtype=torch.uint8, device=DEVICE))
    k = torch.randn(tokens, heads, head_dim, device=DEVICE) + offset * torch.randn(heads, head_dim, device=DEVICE)
    out.k_mean.copy_(k.mean(0))
    reference_encode_keys(k, out)
    reference_encode_values(torch.randn(tokens, heads, head_dim, device=DEVICE), out)
    return out


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 2), (5, 3, 12), (9, 4, 16), (3, 5, 128)])
def test_norm_rope(tokens, heads, head_dim, dtype, rope):
    x = torch.randn(tokens, heads * head_dim + 8, device=DEVICE).to(dtype)[:, : heads * head_dim]
    weight = torch.randn(heads * head_dim, device=DEVICE).to(dtype)
    tables = rotation(tokens, head_dim) if rope else (None, None)
    out = norm_rope_triton(x, weight, 1e-6, heads, *tables)
    expected = reference_norm_rope(x.double(), weight, 1e-6, heads, *tables)
    assert out.shape == (tokens, heads, head_dim)
    assert relative_error(out, expected) < (1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "more"), [(1, 1), (7, 3), (2, 9)])
def test_norm_of_queries_and_keys_in_one_launch_equals_each_alone(tokens, more, dtype):
    two = []
    for count, wider, eps in ((tokens, 8, 1e-6), (more, 24, 1e-3)):
        x = torch.full((count, 36 + wider), float("nan"), device=DEVICE)
        x[:, :36] = torch.randn(count, 36, device=DEVICE) + 1
        two.append(Projection(x.to(dtype)[:, :36], torch.randn(36, device=DEVICE).to(dtype), eps))
    for out, one in zip(norm_both_triton(*two, 3), two, strict=True):
        assert torch.equal(out, norm_rope_triton(one.x_TD, one.weight_D, one.eps, 3, None, None))


def room(tokens, heads, head_dim):
    """A block whose bytes are no zeros, and more of them than it has: what is not written, or too much, shows."""
    layout = SlotLayout(tokens=tokens, heads=heads, head_dim=head_dim)
    slot = torch.full((layout.nbytes + 256,), 85, dtype=torch.uint8, device=DEVICE)
    return layout.block(slot), slot[layout.nbytes :]


SIZES = [(11, 3, 24), (1, 1, 2), (128, 2, 16), (129, 1, 128), (300, 2, 12)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), SIZES)
def test_encode_equals_the_reference(tokens, heads, head_dim, dtype):
    k, v = ((torch.randn(tokens, heads, head_dim, device=DEVICE) * 5 + 2).to(dtype) for _ in range(2))
    (ours, behind), (theirs, _) = room(tokens, heads, head_dim), room(tokens, heads, head_dim)
    for one in (ours, theirs):
        one.k_mean.copy_(k.float().mean(0))
    encode_keys_triton(k, ours)
    set_value_scales(v, ours)
    encode_values_triton(v, ours)
    reference_encode_keys(k, theirs)
    reference_encode_values(v, theirs)
    for field in dataclasses.fields(KVBlock):
        assert torch.equal(getattr(ours, field.name), getattr(theirs, field.name)), field.name
    assert (behind == 85).all()


def test_encode_strided_views_with_zeros_and_nan():
    k, v = (torch.randn(6, 4, 2, 16, device=DEVICE)[:, :, 1] for _ in range(2))
    k[0, 0], k[1, 1, 3], v[2, 1, 5], v[:, 2] = 0, float("nan"), float("nan"), 0
    one, _ = room(6, 4, 16)
    one.k_mean.zero_()
    encode_keys_triton(k, one)
    set_value_scales(v, one)
    encode_values_triton(v, one)
    keys, values = decode_block(one, torch.float32)
    assert not one.k[0, 0].any()
    assert keys[1, 1].isnan().all()
    assert values[:, 1, 5].isnan().all()
    assert not values[:, 2].any()
    k[1, 1], keys[1, 1], v[:, 1, 5], values[:, 1, 5] = 0, 0, 0, 0
    assert relative_error(keys, k) < 0.01
    assert relative_error(values, v) < 0.01


def test_rotated_keys():
    one = block(7, 3, 24, offset=2.0)
    cos, sin = rotation(7, 24)
    out = rotated_keys_triton(one, cos, sin)
    assert relative_error(out, rotate(decode_keys(one, torch.float64), cos, sin)) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("tile", [SMALL, Tile(16, 4, 2)])
@pytest.mark.parametrize(
    ("queries", "heads", "head_dim", "tokens"),
    [(1, 1, 16, (1,)), (33, 2, 32, (40, 128, 7)), (20, 8, 12, (70, 30)), (40, 1, 128, (129, 33)), (9, 1, 256, (130,))],
)
def test_attention_meets_float64(queries, heads, head_dim, tokens, tile):
    blocks = [block(t, heads, head_dim) for t in tokens]
    q = torch.randn(queries, heads, head_dim, device=DEVICE)
    out = ring_attention_triton(q[None], [blocks], tile)[0]
    assert relative_error(out, reference_ring_attention(q, blocks)) < 0.02


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("tokens", [(50, 64), (1, 300), (128, 129, 2)])
def test_attention_has_no_other_error_than_its_eight_bits(tokens, spread):
    blocks = [block(count, 2, 32) for count in tokens]
    q = torch.randn(24, 2, 32, device=DEVICE) * spread
    out = ring_attention_triton(q[None], [blocks], SMALL)[0]
    assert relative_error(out, stepwise_attention(q, blocks)) < 2e-3  # a weight's level, where rounding was close


def test_means_of_the_blocks_are_added_back():
    blocks = [block(32, 1, 32, offset=3.0), block(32, 1, 32, offset=3.0)]
    q = torch.randn(16, 1, 32, device=DEVICE)
    expected = reference_ring_attention(q, blocks)
    assert relative_error(ring_attention_triton(q[None], [blocks], SMALL)[0], expected) < 0.03
    flat = [KVBlock(**{**vars(b), "k_mean": torch.zeros_like(b.k_mean)}) for b in blocks]
    assert relative_error(ring_attention_triton(q[None], [flat], SMALL)[0], expected) > 0.1


def test_wave_items_share_a_launch():
    lists = [[block(40, 2, 32), block(16, 2, 32)] for _ in range(3)]
    q = torch.randn(3, 18, 2, 32, device=DEVICE).bfloat16()
    out = ring_attention_triton(q, lists, SMALL)
    assert out.dtype is torch.bfloat16
    for item, some in enumerate(lists):
        assert relative_error(out[item], reference_ring_attention(q[item], some)) < 0.03


@pytest.mark.parametrize("generation", TILES)
def test_every_chips_tile(generation):
    if DEVICE.type == "cuda":
        pytest.skip("a chip runs its own tile only")
    blocks = [block(150, 1, 64), block(128, 1, 64)]
    q = torch.randn(130, 1, 64)
    out = ring_attention_triton(q[None], [blocks], TILES[generation])[0]
    assert relative_error(out, reference_ring_attention(q, blocks)) < 0.02


def test_default_tile_and_strided_queries():
    blocks = [block(24, 2, 32)]
    q = torch.randn(2, 10, 64, device=DEVICE).transpose(0, 1)[..., :32]
    out = ring_attention_triton(q[None], [blocks], None)[0]
    assert relative_error(out, reference_ring_attention(q, blocks)) < 0.02


def test_large_scores_neither_overflow_nor_vanish():
    blocks = [block(40, 1, 32, offset=30.0)]
    q = torch.randn(16, 1, 32, device=DEVICE) * 30
    out = ring_attention_triton(q[None], [blocks], SMALL)[0]
    assert out.isfinite().all()


def test_what_attention_reads_beside_its_blocks_is_made_once_and_held():
    """A captured launch copies nothing from the host, and what it reads must not be let go."""
    ring, sink = [block(40, 2, 32), block(16, 2, 32)], block(24, 2, 32)
    q, room, tables = torch.randn(18, 2, 32, device=DEVICE), room_for_keys(sink), []
    for _ in range(2):
        blocks = [*ring, rotate_block(sink, *rotation(24, 32), room)]
        with holding() as held:
            out = ring_attention_triton(q[None], [blocks], SMALL)[0]
        assert relative_error(out, reference_ring_attention(q, blocks)) < 0.03
        tables.append(held)
    assert [len(held) for held in tables] == [1, 1]
    assert tables[0][0] is tables[1][0]


def test_parts_off_their_alignment_are_refused():
    layout = SlotLayout(tokens=3, heads=1, head_dim=18)
    one = layout.block(torch.zeros(layout.nbytes + 8, dtype=torch.uint8, device=DEVICE)[8:])
    with pytest.raises(ValueError, match="multiples of 16"):
        ring_attention_triton(torch.randn(1, 4, 1, 18, device=DEVICE), [[one]], SMALL)


def spoilt(what):
    """(queries, blocks, where the result has to be NaN) with something not a number, or infinite, in them."""
    q = torch.randn(4, 2, 32, device=DEVICE)
    k, v = torch.randn(140, 2, 32, device=DEVICE), torch.randn(140, 2, 32, device=DEVICE)
    wrong = torch.zeros(4, 2, 32, dtype=torch.bool, device=DEVICE)
    value = float("inf") if "infinite" in what else float("nan")
    if "query" in what:
        q[1, 0, 5], wrong[1, 0] = value, True
    elif "key" in what:
        k[130, 1, 3], wrong[:, 1] = value, True
    elif "value" in what:
        v[7, 1, 9], wrong[:, 1, 9] = value, True
    one, other = room(140, 2, 32)[0], block(20, 2, 32)
    encode_block(k, v, one)
    return q, [other, one] if "last" in what else [one, other], wrong


@pytest.mark.parametrize(
    "what", ["nothing", "a query", "a key", "a key of the last block", "a value", "a value of the last block",
             "an infinite query", "an infinite key", "an infinite value"]
)  # fmt: skip
def test_what_is_no_number_shows_where_it_is_and_nowhere_else(what):
    q, blocks, wrong = spoilt(what)
    out = ring_attention_triton(q[None], [blocks], SMALL)[0]
    assert not out[wrong].isfinite().any()
    assert out[~wrong].isfinite().all()


@pytest.mark.parametrize("small", [0.0, 1e-30, 1e-12, 1e-3])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_block_of_small_values_beside_others(small, place):
    """The result is held in steps of a block's values: one of all but zeros lets nothing overflow or vanish."""
    blocks = [block(30, 1, 32) for _ in range(3)]
    reference_encode_values(torch.randn(30, 1, 32, device=DEVICE) * small, blocks[place])
    q = torch.randn(5, 1, 32, device=DEVICE)
    out = ring_attention_triton(q[None], [blocks], SMALL)[0]
    assert relative_error(out, reference_ring_attention(q, blocks)) < 0.02


def test_decoded_block_of_a_slot_is_what_was_encoded():
    one = block(9, 2, 16)
    k, v = decode_block(one, torch.float64)
    assert k.shape == v.shape == (9, 2, 16)
    assert k.isfinite().all()
    assert v.isfinite().all()
