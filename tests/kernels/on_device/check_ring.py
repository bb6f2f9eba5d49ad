"""RMSNorm with RoPE, the codec of keys and values, and attention over encoded blocks."""

from __future__ import annotations

import pytest
import torch
from where import DEVICE, relative_error

from lowvram_kernels.holding import holding
from lowvram_kernels.ring_attention import reference_ring_attention
from lowvram_kernels.ring_codec import (
    KVBlock,
    SlotLayout,
    decode_block,
    decode_keys,
    reference_encode,
    room_for_keys,
    rotate_block,
)
from lowvram_kernels.rope import Projection, reference_norm_rope, rotate
from lowvram_kernels.triton_attention import TILES, Tile, ring_attention_triton
from lowvram_kernels.triton_rope import encode_triton, norm_both_triton, norm_rope_triton, rotated_keys_triton

SMALL = Tile(32, 32, 4, 2)


def rotation(tokens, head_dim):
    angle = torch.rand(tokens, head_dim // 2, device=DEVICE) * 6
    return angle.cos(), angle.sin()


def block(tokens, heads, head_dim, offset=1.0):
    """A random block in a slot; ``offset`` is what all keys of a head have in common."""
    layout = SlotLayout(tokens=tokens, heads=heads, head_dim=head_dim)
    out = layout.block(torch.full((layout.nbytes + 16,), 85, dtype=torch.uint8, device=DEVICE))
    k = torch.randn(tokens, heads, head_dim, device=DEVICE) + offset * torch.randn(heads, head_dim, device=DEVICE)
    out.k_mean.copy_(k.mean(0))
    reference_encode(k, out.k_mean, out.k, out.k_scale)
    reference_encode(torch.randn(tokens, heads, head_dim, device=DEVICE), None, out.v, out.v_scale)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [False, True])
def test_encode_equals_the_reference(mean, dtype):
    x = (torch.randn(11, 3, 24, device=DEVICE) * 5 + 2).to(dtype)
    middle = x.float().mean(0).bfloat16() if mean else None
    results = []
    for encode in (encode_triton, reference_encode):
        q = torch.full((11, 3, 24), 85, dtype=torch.int8, device=DEVICE)
        scale = torch.full((11, 3), 7.0, dtype=torch.bfloat16, device=DEVICE)
        encode(x, middle, q, scale)
        results.append((q, scale))
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0], results[1][0])


def test_encode_a_strided_view_with_zeros_and_nan():
    x = torch.randn(6, 4, 2, 16, device=DEVICE)[:, :, 1]
    x[0, 0], x[1, 1, 3] = 0, float("nan")
    q = torch.empty(6, 4, 16, dtype=torch.int8, device=DEVICE)
    scale = torch.empty(6, 4, dtype=torch.bfloat16, device=DEVICE)
    encode_triton(x, None, q, scale)
    assert not q[0, 0].any()
    assert scale[1, 1].isnan()
    x[1, 1] = 0
    q[1, 1], scale[1, 1] = 0, 0
    assert relative_error(q.float() * scale.float()[..., None], x) < 0.01


def test_rotated_keys():
    one = block(7, 3, 24, offset=2.0)
    cos, sin = rotation(7, 24)
    out = rotated_keys_triton(one, cos, sin)
    assert relative_error(out, rotate(decode_keys(one, torch.float64), cos, sin)) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("tile", [SMALL, Tile(16, 64, 4, 2)])
@pytest.mark.parametrize(
    ("queries", "heads", "head_dim", "tokens"),
    [(1, 1, 16, (1,)), (33, 2, 32, (40, 64, 7)), (20, 8, 12, (70, 30)), (40, 1, 128, (129, 33))],
)
def test_attention_meets_float64(queries, heads, head_dim, tokens, tile):
    blocks = [block(t, heads, head_dim) for t in tokens]
    q = torch.randn(queries, heads, head_dim, device=DEVICE)
    out = ring_attention_triton(q[None], [blocks], tile)[0]
    assert relative_error(out, reference_ring_attention(q, blocks)) < 0.02


def test_attention_has_no_other_error_than_the_queries_eight_bits():
    blocks = [block(50, 2, 32), block(64, 2, 32)]
    q8 = torch.randint(-127, 128, (24, 2, 32), device=DEVICE).float()
    q8[..., 0] = 127.0  # the largest value decides the scale: quantizing these queries changes nothing
    out = ring_attention_triton((q8 / 32)[None], [blocks], SMALL)[0]
    # What is left are the weights' and values' roundings to bfloat16.
    assert relative_error(out, reference_ring_attention(q8 / 32, blocks)) < 3e-3


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
    one = block(3, 1, 18)
    with pytest.raises(ValueError, match="multiples of 16"):
        ring_attention_triton(torch.randn(1, 4, 1, 18, device=DEVICE), [[one]], SMALL)


def test_queries_that_are_not_finite_show():
    blocks = [block(16, 1, 32)]
    q = torch.randn(4, 1, 32, device=DEVICE)
    q[1, 0, 5] = float("nan")
    out = ring_attention_triton(q[None], [blocks], SMALL)[0]
    assert out[1].isnan().all()
    assert out[2:].isfinite().all()


def test_decoded_block_of_a_slot_is_what_was_encoded():
    one = block(9, 2, 16)
    k, v = decode_block(one, torch.float64)
    assert k.shape == v.shape == (9, 2, 16)
    assert k.isfinite().all()
    assert v.isfinite().all()
