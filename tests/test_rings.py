"""4-bit rings as the benchmark simulates them: codes and their bits, what attention sees, and what plans would say."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowvram.denoise import rollout
from lowvram.denoise.kv_format import Own, PlainFormat, kv_format
from lowvram.planning import Workload
from lowvram.planning.memory_costs import kv_bytes
from lowvram_kernels.errors import OutOfMemoryError
from lowvram_kernels.ring_codec import SlotLayout, decode_block, encode_block
from lowvram_models.rope import apply_rope, block_rope, condition_rope

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TOKENS, HEADS, WIDTH = 96, 3, 64


@pytest.fixture
def variants(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    import ring_variants

    return ring_variants


@pytest.fixture
def rings(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    import rings

    return rings


def values(*shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x * (1 + 4 * (torch.arange(shape[-1]) % 16 == 3))


BITS = [
    ({"group": 128}, 128, 4 + 16 / 128),
    ({"group": 32}, 128, 4 + 16 / 32),
    ({"group": 32, "offset": True}, 128, 4 + 32 / 32),
    ({"group": 32, "offset": True, "hadamard": True}, 128, 4 + 32 / 32),
    ({"group": 32, "mean": True}, 128, 4 + 16 / 32 + 16 / 96),
    ({"group": 128}, 16, 4 + 16 / 16),
    ({"bits": 8, "group": 128, "mean": True}, 128, 8 + 16 / 128 + 16 / 96),
    ({"along": "tokens", "group": 32}, 128, 4 + 16 * 3 / 96),
    ({"along": "tokens", "group": 64, "offset": True}, 128, 4 + 32 * 2 / 96),
]


@pytest.mark.parametrize(("how", "head_dim", "bits"), BITS)
def test_bits_a_value(variants, how, head_dim, bits):
    assert variants.Coding(**how).bits_a_value(TOKENS, head_dim) == pytest.approx(bits)


@pytest.mark.parametrize("how", [how for how, _, _ in BITS if not how.get("hadamard")])
def test_a_value_comes_back_within_half_a_step_of_its_group(variants, how):
    coding = variants.Coding(**how)
    x = values(TOKENS, HEADS, WIDTH)
    away = x - x.mean(dim=0, keepdim=True) if coding.mean else x
    if coding.along == "tokens":
        away, x, back = away.movedim(0, -1), x.movedim(0, -1), coding(x).movedim(0, -1)
    else:
        back = coding(x)
    for part, ours, theirs in zip(
        *(t.split(min(coding.group, t.shape[-1]), dim=-1) for t in (away, back, x)), strict=True
    ):
        span = part.amax(-1) - part.amin(-1) if coding.offset else 2 * part.abs().amax(-1)
        step = span / (2**coding.bits - 2 + coding.offset)
        assert bool(((ours - theirs).abs().amax(-1) <= 0.54 * step + 0.01 * part.abs().amax(-1) * coding.offset).all())
    assert len({round(value, 4) for value in back[..., 0, :16].flatten().tolist()}) > 1


def test_a_turned_head_comes_back_in_its_own_basis(variants):
    """16 bits lose nothing to speak of but the rounding of a group's least value, with an uneven rest of tokens."""
    for how in ({"hadamard": True}, {"mean": True}, {"offset": True}, {"along": "tokens", "offset": True}):
        x = values(77, HEADS, WIDTH)
        assert torch.allclose(variants.Coding(bits=16, **how)(x), x, atol=0.05 if "offset" in how else 2e-3)


def test_rotation_spreads_a_large_channel(variants):
    x = values(TOKENS, HEADS, WIDTH)
    plain, turned = (variants.Coding(group=64, hadamard=on)(x) for on in (False, True))
    assert (turned - x).norm() < 0.8 * (plain - x).norm()


def test_8_bits_are_those_of_the_rings_codec(variants):
    k, v = values(TOKENS, HEADS, WIDTH), values(TOKENS, HEADS, WIDTH, seed=1)
    layout = SlotLayout(tokens=TOKENS, heads=HEADS, head_dim=WIDTH)
    block = layout.block(torch.empty(layout.nbytes, dtype=torch.uint8))
    encode_block(k, v, block)
    for mine, theirs in zip((variants.INT8_KEYS(k), variants.INT8(v)), decode_block(block, torch.float32), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("name", ["exact", "even", "offset", "channel-before", "turned", "sink-too"])
def test_attention_sees_what_was_rounded_and_the_sink_apart(variants, name):
    variant, grid = variants.VARIANTS[name], (4, 6)
    plain = PlainFormat(HEADS, WIDTH, torch.float32)
    rounded = variants.Rounded(HEADS, WIDTH, torch.float32, variant)
    q, k, v = (values(72, HEADS, WIDTH, seed=seed) for seed in range(3))
    rope, sink_rope = block_rope(0, 3, *grid, WIDTH), condition_rope(*grid, WIDTH)
    sink_k, sink_v = (values(len(sink_rope.cos), HEADS, WIDTH, seed=seed) for seed in (3, 4))
    heads = [lambda rope, x=x: x if rope is None else apply_rope(x, rope) for x in (q, k)]
    rotated = apply_rope(variant.keys(k), rope) if variant.keys.before_rope else variant.keys(apply_rope(k, rope))
    outs = []
    for kind, given in ((rounded, (heads[1], v)), (plain, (lambda _rope: rotated, variant.values(v)))):
        slot, sink = (torch.empty(kind.nbytes(n), dtype=torch.uint8) for n in (72, len(sink_k)))
        wanted = (sink_k, sink_v) if kind is rounded else (variant.sink_keys(sink_k), variant.sink_values(sink_v))
        kind.write(sink, *wanted)
        own = Own(heads[0], *given, rope)
        outs.append(kind.attend(own, 0, [(slot, 72)], (sink, len(sink_k)), sink_rope))
    assert torch.allclose(*outs, atol=1e-5)


def test_rollouts_keep_their_rings_so_for_a_while(rings):
    variant = rings.VARIANTS["even"]
    with rings.kept_as(variant):
        assert isinstance(rollout.kv_format("plain", 2, 8, torch.float32), rings.Rounded)
    with rings.kept_as(None):
        assert rollout.kv_format is kv_format
    assert rollout.kv_format is kv_format


@pytest.mark.parametrize("name", ["whole-head", "even", "offset", "turned-head", "turned"])
def test_large_channels_cost_4_bits_more_than_8(rings, variants, name):
    eight = variants.Variant(title="", keys=variants.INT8_KEYS, values=variants.INT8)
    error = rings.planted_error(variants.VARIANTS[name], tokens=1056, heads=1)
    assert 4 * rings.planted_error(eight, tokens=1056, heads=1) < error < 1


@pytest.mark.parametrize("name", ["whole-head", "even", "offset", "turned-head", "offset-16"])
def test_bytes_of_rings_in_4_bits(rings, variants, name):
    config = SimpleNamespace(head_dim=128)
    work, coding = Workload.of_size("704*384"), variants.VARIANTS[name].values
    counted = rings.four_bits(work, coding)
    block = counted(config, work.block_tokens, "int8", 40, 2)
    values = 2 * work.block_tokens * 40 * 128
    assert block.payload == values // 2
    assert (block.payload + block.scales) * 8 / values == pytest.approx(coding.bits_a_value(work.block_tokens, 128))
    for other in ((work.sink_tokens, "int8"), (work.block_tokens, "plain")):
        assert counted(config, *other, 40, 2) == kv_bytes(config, *other, 40, 2)


@pytest.mark.parametrize("least", [1, 2, 21, 63, 64])
def test_the_smallest_host(rings, least):
    def found(ram_gib):
        if ram_gib < least:
            raise OutOfMemoryError("too little")

    assert rings.smallest(found) == least


def test_a_plan_with_4_bits_keeps_more_on_the_card(rings, variants, tmp_path, monkeypatch):
    monkeypatch.setattr(rings, "smallest", lambda _found: 13)
    case = ("rtx5090", 30.0, "704*384")
    eight, four = (
        rings.planned(tmp_path, *case, name, coding)
        for name, coding in (("int8", None), ("turned-head", variants.VARIANTS["turned-head"].values))
    )
    assert four["rings_on_host"] < eight["rings_on_host"]
    assert four["host_gib"] < eight["host_gib"]
    assert four["predicted_pcie_s"] < eight["predicted_pcie_s"]
    table = rings.plan_markdown([eight, four]).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert "4 bits, turned-head, 4.12 a value" in table[-1]
