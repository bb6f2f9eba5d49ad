"""Trials of keys, values and attention: RMSNorm with RoPE, the codec of the rings, attention over their blocks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from lowvram.selftest.trials import (
    BF16,
    EPS,
    HALF_STEP,
    Measured,
    Outputs,
    Sizes,
    Trial,
    random,
    relative_error,
    sampled,
    steps_off,
)
from lowvram_kernels.attention import library_sdpa, sdpa
from lowvram_kernels.choices import ONE_BY_ONE, RIVALS, TORCH, TRITON
from lowvram_kernels.projected import Projected, TurnedSink, attend_parts
from lowvram_kernels.ring_attention import decoded_attention, reference_ring_attention
from lowvram_kernels.ring_codec import (
    KVBlock,
    SlotLayout,
    decode_block,
    decode_keys,
    reference_encode_keys,
    reference_encode_values,
    set_value_scales,
)
from lowvram_kernels.rope import Projection, reference_norm_rope, rotate

Tensor = torch.Tensor
REFERENCE_QUERIES = 64
AS_RIGHT = 1.2
"""Times PyTorch's own error, for another library's attention to stand for it."""


def rotation(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    angle = torch.rand(sizes.tokens, sizes.head_dim // 2, device=device) * 6
    return angle.cos(), angle.sin()


def empty_block(sizes: Sizes, device: torch.device, tokens: int) -> KVBlock:
    """In a slot whose bytes are no zeros, so that a kernel that writes too little shows."""
    layout = SlotLayout(tokens=tokens, heads=sizes.heads, head_dim=sizes.head_dim)
    return layout.block(torch.full((layout.nbytes,), 85, dtype=torch.uint8, device=device))


def random_block(sizes: Sizes, device: torch.device, tokens: int) -> KVBlock:
    """Keys of a head lie around a common vector."""
    k = random(device, tokens, sizes.heads, sizes.head_dim) + random(device, sizes.heads, sizes.head_dim)
    return reference_block(sizes, k, random(device, tokens, sizes.heads, sizes.head_dim))


def reference_block(sizes: Sizes, k_TNH: Tensor, v_TNH: Tensor) -> KVBlock:
    """Encoded by PyTorch, whatever kernels are at hand."""
    out = empty_block(sizes, k_TNH.device, len(k_TNH))
    out.k_mean.copy_(k_TNH.mean(0))
    reference_encode_keys(k_TNH, out)
    reference_encode_values(v_TNH, out)
    return out


def norm_rope(sizes: Sizes, device: torch.device) -> Trial:
    """Queries of a block's tokens, rotated; then without rotation, with keys of fewer tokens in the same launch."""
    x = random(device, sizes.tokens, sizes.width).bfloat16()
    weight, tables = random(device, sizes.width).bfloat16(), rotation(sizes, device)
    other = random(device, -(-sizes.tokens // 6), sizes.width).bfloat16()
    two = (Projection(x, weight, EPS), Projection(other, random(device, sizes.width).bfloat16(), EPS))

    def triton() -> Outputs:
        from lowvram_kernels.triton_rope import norm_both_triton, norm_rope_triton

        both = dict(zip(("queries", "keys"), norm_both_triton(*two, sizes.heads), strict=True))
        return both | {"rotated": norm_rope_triton(x, weight, EPS, sizes.heads, *tables)}

    def reference(dtype: torch.dtype) -> Outputs:
        given = {"queries": (two[0], ()), "keys": (two[1], ()), "rotated": (two[0], tables)}
        return {
            name: reference_norm_rope(one.x_TD.to(dtype), one.weight_D, EPS, sizes.heads, *table)
            for name, (one, table) in given.items()
        }

    def judge(out: Outputs) -> Mapping[str, Measured]:
        exact = reference(torch.float64)
        return {name: Measured(error=relative_error(out[name], exact[name]), bound=BF16) for name in exact}

    return Trial(backends={TRITON: triton, TORCH: lambda: reference(torch.bfloat16)}, judge=judge)


def encode_kv(sizes: Sizes, device: torch.device) -> Trial:
    k, v = (random(device, sizes.tokens, sizes.heads, sizes.head_dim) * 5 + 2 for _ in range(2))

    def room() -> KVBlock:
        block = empty_block(sizes, device, sizes.tokens)
        block.k_mean.copy_(k.mean(0))
        return block

    def named(block: KVBlock) -> Outputs:
        return {field.name: getattr(block, field.name) for field in dataclasses.fields(block)}

    def triton() -> Outputs:
        from lowvram_kernels.triton_rope import encode_keys_triton
        from lowvram_kernels.triton_values import encode_values_triton

        block = room()
        encode_keys_triton(k, block)
        set_value_scales(v, block)
        encode_values_triton(v, block)
        return named(block)

    def plain() -> Outputs:
        block = room()
        reference_encode_keys(k, block)
        reference_encode_values(v, block)
        return named(block)

    def judge(out: Outputs) -> Mapping[str, Measured]:
        scale = reference_block(sizes, k, v).k_scale
        keys = steps_off(out["k"], out["k_scale"][..., None], k.double() - out["k_mean"].double())
        _, values = decode_block(KVBlock(**out), torch.float64)
        off = (values - v.double()).abs() / out["v_scale"].double()
        behind = out["v"].transpose(2, 3).flatten(1, 2)[:, sizes.tokens :]
        sums = out["v"].int().sum(-1) - out["v_sums"]
        return {
            "k_scale": Measured(error=relative_error(out["k_scale"], scale), bound=BF16),
            "k": Measured(error=keys, bound=HALF_STEP),
            "v": Measured(error=off.max().item(), bound=HALF_STEP),
            "v_sums": Measured(error=float(sums.abs().max() + behind.abs().sum()), bound=0.5),
        }

    return Trial(backends={TRITON: triton, TORCH: plain}, judge=judge)


def attend_projected(sizes: Sizes, device: torch.device) -> Trial:
    """A block's tokens into the first slot of the ring, then over all of it and the sink."""
    tokens, heads, head_dim = sizes.tokens, sizes.heads, sizes.head_dim
    q, k = (
        Projection(
            (random(device, tokens, sizes.width) + 1).bfloat16(), random(device, sizes.width).bfloat16() * 3, EPS
        )
        for _ in range(2)
    )
    v, tables = random(device, tokens, heads, head_dim).bfloat16(), rotation(sizes, device)
    own = Projected(q, k, v, *tables)
    others = [random_block(sizes, device, count) for count in sizes.slots[1:]]
    kept = random_block(sizes, device, tokens)

    def named(attend: Callable[[Projected, int, Sequence[KVBlock], TurnedSink], Tensor]) -> Outputs:
        block = empty_block(sizes, device, tokens)
        room = empty_block(sizes, device, tokens)
        attended = attend(own, 0, [block, *others], TurnedSink(kept, *tables, room))
        keys, values = decode_block(block, torch.float64)
        scales = {"k_scale": block.k_scale, "v_scale": block.v_scale, "k_mean": block.k_mean}
        return {"attended": attended, "keys": keys, "values": values} | scales

    def triton() -> Outputs:
        from lowvram_kernels.triton_projected import attend_projected_triton

        return named(attend_projected_triton)

    rows = sampled(tokens)
    rows = rows[:: max(1, len(rows) // REFERENCE_QUERIES)].to(device)

    def judge(out: Outputs) -> Mapping[str, Measured]:
        exact = reference_norm_rope(k.x_TD.double(), k.weight_D, EPS, heads, *tables)
        # The parts round keys to bfloat16 between the passes: its part of the bound is 2^-9 of a value.
        allowed = HALF_STEP * out["k_scale"].double()[..., None] + 2.0**-8 * exact.abs()
        block = reference_block(sizes, exact.float(), v)
        turned = reference_block(sizes, rotate(decode_keys(kept, torch.float32), *tables), v)
        turned = dataclasses.replace(kept, k=turned.k, k_scale=turned.k_scale, k_mean=turned.k_mean)
        queries = reference_norm_rope(q.x_TD[rows].double(), q.weight_D, EPS, heads, *(table[rows] for table in tables))
        expected = reference_ring_attention(queries, [block, *others, turned])
        values = (out["values"] - v.double()).abs() / out["v_scale"].double()
        return {
            "attended": Measured(error=relative_error(out["attended"][rows], expected), bound=0.02),
            "keys": Measured(error=((out["keys"] - exact).abs() / allowed).max().item(), bound=1.0),
            "values": Measured(error=values.max().item(), bound=HALF_STEP),
            "k_mean": Measured(error=relative_error(out["k_mean"], exact.mean(0)), bound=BF16),
        }

    return Trial(backends={TRITON: triton, ONE_BY_ONE: lambda: named(attend_parts)}, judge=judge)


def rotate_keys(sizes: Sizes, device: torch.device) -> Trial:
    block, tables = random_block(sizes, device, sizes.tokens), rotation(sizes, device)

    def triton() -> Outputs:
        from lowvram_kernels.triton_rope import rotated_keys_triton

        return {"keys": rotated_keys_triton(block, *tables)}

    def plain() -> Outputs:
        return {"keys": rotate(decode_keys(block, torch.float32), *tables)}

    def judge(out: Outputs) -> Mapping[str, Measured]:
        expected = rotate(decode_keys(block, torch.float64), *tables)
        return {"keys": Measured(error=relative_error(out["keys"], expected), bound=BF16)}

    return Trial(backends={TRITON: triton, TORCH: plain}, judge=judge)


def ring_attention(sizes: Sizes, device: torch.device) -> Trial:
    blocks = [random_block(sizes, device, tokens) for tokens in sizes.slots]
    q = random(device, sizes.tokens, sizes.heads, sizes.head_dim).bfloat16()
    rows = sampled(sizes.tokens)
    rows = rows[:: max(1, len(rows) // REFERENCE_QUERIES)].to(device)

    def triton() -> Outputs:
        from lowvram_kernels.triton_attention import ring_attention_triton

        return {"attended": ring_attention_triton(q[None], [blocks], None)[0]}

    def plain() -> Outputs:
        return {"attended": decoded_attention(q, blocks)}

    def judge(out: Outputs) -> Mapping[str, Measured]:
        expected = reference_ring_attention(q[rows], blocks)
        return {"attended": Measured(error=relative_error(out["attended"][rows], expected), bound=0.02)}

    return Trial(backends={TRITON: triton, TORCH: plain}, judge=judge)


def attention(sizes: Sizes, device: torch.device) -> Trial:
    """Over plain keys and values: a block's queries and all slots of the ring joined. Scores spread by 4 nats, as heads
    that look at little have them: there 8 bits cost more than 16, and who computes in them may not stand for who asked
    for more."""
    q, k, v = (
        (random(device, tokens, sizes.heads, sizes.head_dim) * spread).bfloat16()
        for tokens, spread in ((sizes.tokens, 4), (sum(sizes.slots), 1), (sum(sizes.slots), 1))
    )
    rows = sampled(sizes.tokens)
    rows = rows[:: max(1, len(rows) // REFERENCE_QUERIES)].to(device)

    def judge(out: Outputs) -> Mapping[str, Measured]:
        scores = torch.einsum("lnh,snh->nls", q[rows].double(), k.double()) * sizes.head_dim**-0.5
        expected = torch.einsum("nls,snh->lnh", scores.softmax(dim=-1), v.double())
        own = relative_error(sdpa(q, k, v)[rows], expected)
        found = relative_error(out["attended"][rows], expected)
        return {"attended": Measured(error=found, bound=min(0.02, AS_RIGHT * own))}

    def other(name: str) -> Outputs:
        return {"attended": library_sdpa(name, q, k, v)}

    backends: dict[str, Callable[[], Outputs]] = {name: functools.partial(other, name) for name in RIVALS["attention"]}
    return Trial(backends={TORCH: lambda: {"attended": sdpa(q, k, v)}, **backends}, judge=judge)
