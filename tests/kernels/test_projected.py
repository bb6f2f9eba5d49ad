"""Self-attention from its projections on, by its parts; the Triton kernels have ``on_device/check_projected.py``."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lowvram_kernels import projected
from lowvram_kernels.choices import ONE_BY_ONE, TRITON
from lowvram_kernels.projected import Projected, TurnedSink, attend_projected
from lowvram_kernels.ring_codec import KVBlock, SlotLayout, decode_block, decode_keys, encode_block, room_for_keys
from lowvram_kernels.rope import Projection, norm_rope, rotate
from lowvram_kernels.trace import trace_kernels

T, S, N, H = 30, 9, 4, 16
EPS = 1e-6


def block(tokens: int = T, heads: int = N, head_dim: int = H) -> KVBlock:
    layout = SlotLayout(tokens=tokens, heads=heads, head_dim=head_dim)
    out = layout.block(torch.zeros(layout.nbytes, dtype=torch.uint8))
    k, v = (torch.randn(tokens, heads, head_dim) for _ in range(2))
    encode_block(k + 2 * torch.randn(heads, head_dim), v, out)
    return out


def rotation(tokens: int, head_dim: int = H) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(tokens, head_dim // 2) * 6
    return angle.cos(), angle.sin()


def operands(dtype: torch.dtype = torch.float32) -> tuple[Projected, int, list[KVBlock], TurnedSink]:
    torch.manual_seed(0)
    q, k = (Projection(torch.randn(T, N * H).to(dtype), torch.randn(N * H).to(dtype), EPS) for _ in range(2))
    own = Projected(q, k, torch.randn(T, N, H).to(dtype), *rotation(T))
    return own, 1, [block(7), block(), block(40)], TurnedSink(block(S), *rotation(S))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(dtype):
    own, slot, blocks, sink = operands(dtype)
    with trace_kernels() as counts:
        out = attend_projected(own, slot, blocks, sink)
    q, k = (norm_rope(x.x_TD.double(), x.weight_D, EPS, N, own.cos_TP, own.sin_TP) for x in (own.q, own.k))
    keys, values = decode_block(blocks[slot], torch.float64)
    assert (keys - k).norm() / k.norm() < 0.01
    assert ((values - own.v_TNH.double()).abs() <= 0.501 * blocks[slot].v_scale.double()).all()
    pairs = [decode_block(one, torch.float64) for one in (*blocks, sink.block)]
    all_k, all_v = (list(part) for part in zip(*pairs, strict=True))
    all_k[-1] = rotate(decode_keys(sink.block, torch.float64), sink.cos_TP.double(), sink.sin_TP.double())
    scores = torch.einsum("lnh,snh->nls", q, torch.cat(all_k)) / H**0.5
    exact = torch.einsum("nls,snh->lnh", scores.softmax(-1), torch.cat(all_v))
    assert (out.shape, out.dtype) == (exact.shape, dtype)
    assert (out.double() - exact).norm() / exact.norm() < (1e-6 if dtype is torch.float32 else 0.01)
    assert {name for name, _ in counts} == {"norm_rope", "encode_kv", "ring_attention"}


@pytest.mark.parametrize("off", [None, "attend_projected", "ring_attention"])
def test_the_kernel_runs_where_neither_it_nor_its_attention_is_switched_off(off, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed: there is no kernel")
    from lowvram_kernels import triton_projected

    monkeypatch.setattr(projected, "choose", lambda name, device: ONE_BY_ONE if name == off else TRITON)
    monkeypatch.setattr(triton_projected, "attend_projected_triton", lambda *_: "in one")
    monkeypatch.setattr(projected, "attend_parts", lambda *_: "by its parts")
    assert attend_projected(*operands()) == ("by its parts" if off else "in one")


def test_the_parts_use_the_room_for_rotated_keys(monkeypatch):
    own, slot, blocks, sink = operands()
    room, seen = room_for_keys(sink.block), []
    monkeypatch.setattr(projected, "ring_and_sink_attention", lambda *_, rotated: seen.append(rotated))
    attend_projected(own, slot, blocks, dataclasses.replace(sink, room=room))
    assert seen[0] is room


def changed(own: Projected, name: str, **fields: torch.Tensor) -> Projected:
    return dataclasses.replace(own, **{name: dataclasses.replace(getattr(own, name), **fields)})


WRONG = {
    "keys of fewer channels": lambda own, sink: (changed(own, "k", x_TD=own.k.x_TD[:, :8]), sink),
    "queries of fewer tokens": lambda own, sink: (changed(own, "q", x_TD=own.q.x_TD[:5]), sink),
    "values of fewer heads": lambda own, sink: (dataclasses.replace(own, v_TNH=own.v_TNH[:, :1]), sink),
    "a norm of another width": lambda own, sink: (changed(own, "k", weight_D=own.k.weight_D[:8]), sink),
    "rotations of fewer tokens": lambda own, sink: (dataclasses.replace(own, cos_TP=own.cos_TP[:5]), sink),
    "a sink's rotations of more tokens": lambda own, sink: (
        own,
        dataclasses.replace(sink, sin_TP=torch.ones(S + 1, 8)),
    ),
    "a sink of fewer heads": lambda own, sink: (own, dataclasses.replace(sink, block=block(S, heads=2))),
    "a sink of narrower heads": lambda own, sink: (own, TurnedSink(block(S, head_dim=8), *rotation(S, 8))),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused_before_anything_is_written(what):
    own, slot, blocks, sink = operands()
    before = decode_block(blocks[slot], torch.float32)
    wrong, wrong_sink = WRONG[what](own, sink)
    with pytest.raises(ValueError, match=r"expected|heads or width differ|both"):
        attend_projected(wrong, slot, blocks, wrong_sink)
    assert all(torch.equal(*pair) for pair in zip(before, decode_block(blocks[slot], torch.float32), strict=True))
