from __future__ import annotations

import dataclasses

import pytest
import torch

from lowvram_kernels.ring_attention import reference_ring_attention, ring_attention, stepwise_attention
from lowvram_kernels.ring_codec import SlotLayout, decode_block, encode_block, rotate_block
from lowvram_kernels.trace import trace_kernels

N, H = 2, 16


def block(tokens, offset=1.0):
    layout = SlotLayout(tokens=tokens, heads=N, head_dim=H)
    out = layout.block(torch.zeros(layout.nbytes, dtype=torch.uint8))
    encode_block(torch.randn(tokens, N, H) + offset * torch.randn(N, H), torch.randn(tokens, N, H), out)
    return out


@pytest.mark.parametrize("tokens", [(1,), (12, 7), (8, 8, 8, 5)])
def test_meets_float64_over_the_joined_blocks(tokens):
    blocks, q = [block(t) for t in tokens], torch.randn(9, N, H)
    out = ring_attention(q, blocks)
    expected = reference_ring_attention(q, blocks)
    assert out.shape == q.shape
    assert (out - expected).norm() / expected.norm() < 1e-5


def test_reference_is_softmax_attention():
    blocks, q = [block(5), block(6)], torch.randn(3, N, H, dtype=torch.float64)
    k, v = (torch.cat(parts) for parts in zip(*(decode_block(b, torch.float64) for b in blocks), strict=True))
    for n in range(N):
        weights = (q[:, n] @ k[:, n].t() / H**0.5).softmax(1)
        assert torch.allclose(reference_ring_attention(q, blocks)[:, n], weights @ v[:, n])


def test_eight_bits_cost_a_percent():
    k, v, q = torch.randn(64, N, H) + 3 * torch.randn(N, H), torch.randn(64, N, H), torch.randn(20, N, H)
    layout = SlotLayout(tokens=64, heads=N, head_dim=H)
    one = layout.block(torch.zeros(layout.nbytes, dtype=torch.uint8))
    encode_block(k, v, one)
    exact = torch.nn.functional.scaled_dot_product_attention(*(t.double().transpose(0, 1) for t in (q, k, v)))
    out = ring_attention(q, [one]).transpose(0, 1)
    assert 0 < (out - exact).norm() / exact.norm() < 0.015


def test_sink_is_one_more_block():
    ring, sink, q = block(8), block(6), torch.randn(4, N, H)
    angle = torch.rand(6, H // 2)
    turned = rotate_block(sink, angle.cos(), angle.sin())
    out = ring_attention(q, [ring, turned])
    assert (out - ring_attention(q, [turned, ring])).abs().max() < 1e-5
    assert (out - ring_attention(q, [ring, sink])).abs().max() > 1e-3


def test_wave_items_attend_to_their_own_lists():
    lists, q = [[block(5), block(3)], [block(4), block(9)]], torch.randn(2, 6, N, H)
    with trace_kernels() as counts:
        out = ring_attention(q, lists)
    for item in range(2):
        assert torch.equal(out[item], ring_attention(q[item], lists[item]))
    assert counts == {("ring_attention", "int8 decoded to float32: torch scaled_dot_product_attention"): 1}


def test_dtype_stays_and_no_query_gives_none():
    assert ring_attention(torch.randn(3, N, H).bfloat16(), [block(4)]).dtype is torch.bfloat16
    assert ring_attention(torch.empty(0, N, H), [block(4)]).shape == (0, N, H)


def test_bad_operands_are_refused():
    q, one = torch.randn(3, N, H), block(4)
    with pytest.raises(ValueError, match="at least one block"):
        ring_attention(q, [])
    with pytest.raises(ValueError, match="all equally long"):
        ring_attention(torch.stack([q, q]), [[one], [one, one]])
    with pytest.raises(ValueError, match="heads or width differ"):
        ring_attention(torch.randn(3, N, 8), [one])
    with pytest.raises(TypeError, match="floating point"):
        ring_attention(q.int(), [one])
    with pytest.raises(TypeError, match="from encode_block"):
        ring_attention(q, [dataclasses.replace(one, k=one.k.float())])
    with pytest.raises(ValueError, match="copy the block there"):
        ring_attention(q, [dataclasses.replace(one, k=one.k.to("meta"))])


@pytest.mark.parametrize("tokens", [(1,), (12, 130), (128, 256, 5)])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_the_kernels_steps_cost_little(tokens, spread):
    """Queries and weights in 8 bits; the weights of what matters are far from the least that 255 levels show."""
    blocks, q = [block(t) for t in tokens], torch.randn(9, N, H) * spread
    expected = reference_ring_attention(q, blocks)
    assert (stepwise_attention(q, blocks) - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("what", ["query", "key", "value"])
def test_nan_shows_in_the_kernels_steps(what):
    q, k, v = (torch.randn(140, N, H) for _ in range(3))
    {"query": q, "key": k, "value": v}[what][131, 1, 3] = float("nan")
    layout = SlotLayout(tokens=140, heads=N, head_dim=H)
    one = layout.block(torch.zeros(layout.nbytes, dtype=torch.uint8))
    encode_block(k, v, one)
    for out in (stepwise_attention(q, [block(5), one]), ring_attention(q, [block(5), one])):
        wrong = {"query": out[131, 1], "key": out[:, 1], "value": out[:, 1, 3]}[what]
        assert wrong.isnan().all()
        assert out[:, 0].isfinite().all()
