"""Adapters beyond B @ A: each kind merged against its formula in plain torch, and each half or ill-fitting one said."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram_kernels.errors import CheckpointError, ConfigError
from lowvram_quantize.convert import convert
from lowvram_quantize.lora import LoraSource, merge_loras, open_lora
from lowvram_quantize.recognise import parts_of
from lowvram_quantize.source import TensorTable, open_safetensors
from tests.quantize.checkpoints import base_of, load_dit, refusal

Tensor = torch.Tensor
Q, OUT, IN, R = "blocks.0.self_attn.q", 12, 8, 2
GENERATOR = torch.Generator().manual_seed(5)
BASE = {
    f"{Q}.weight": torch.ones(OUT, IN), f"{Q}.bias": torch.ones(OUT), "blocks.0.modulation": torch.ones(1, 6, 4),
    "conv.weight": torch.ones(4, 3, 1, 2, 2), "blocks.0.norm3.weight": torch.ones(IN),
}  # fmt: skip


def some(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


W1A, W1B, W2A, W2B = some(OUT, R), some(R, IN), some(OUT, R), some(R, IN)
A, B = some(R, IN), some(OUT, R)
LOHA = {"hada_w1_a": W1A, "hada_w1_b": W1B, "hada_w2_a": W2A, "hada_w2_b": W2B}
K1, K2, K1A, K1B, K2A, K2B = some(3, 2), some(4, 4), some(3, R), some(R, 2), some(4, R), some(R, 4)
D = {name: some(*tensor.shape) for name, tensor in BASE.items()}
PAIR = {"lora_down.weight": A, "lora_up.weight": B}
LOHA_DELTA = (W1A @ W1B) * (W2A @ W2B)


def named(
    factors: dict[str, Tensor], layer: str = f"diffusion_model.{Q}", alpha: float | None = None
) -> dict[str, Tensor]:
    own = {} if alpha is None else {f"{layer}.alpha": torch.tensor(alpha)}
    return {f"{layer}.{name}": tensor.clone() for name, tensor in factors.items()} | own


KOHYA = "lora_unet_blocks_0_self_attn_q"
KINDS = {
    "LoHa": (named(LOHA, alpha=3.0), {f"{Q}.weight": 1.5 * LOHA_DELTA}),
    "LoHa without an alpha": (named(LOHA), {f"{Q}.weight": LOHA_DELTA}),
    "LoHa, kohya's names": (named(LOHA, KOHYA, 4.0), {f"{Q}.weight": 2 * LOHA_DELTA}),
    "LoHa, with a tail": (named({f"{n}.default.weight": t for n, t in LOHA.items()}), {f"{Q}.weight": LOHA_DELTA}),
    "LoKr of whole factors": (
        named({"lokr_w1": K1, "lokr_w2": K2}, alpha=9999220736.0), {f"{Q}.weight": torch.kron(K1, K2)}
    ),
    "LoKr, second a product": (
        named({"lokr_w1": K1, "lokr_w2_a": K2A, "lokr_w2_b": K2B}, alpha=1.0),
        {f"{Q}.weight": 0.5 * torch.kron(K1, K2A @ K2B)},
    ),
    "LoKr, first a product": (
        named({"lokr_w1_a": K1A, "lokr_w1_b": K1B, "lokr_w2": K2}, alpha=6.0),
        {f"{Q}.weight": 3 * torch.kron(K1A @ K1B, K2)},
    ),
    "LoKr, both products": (
        named({"lokr_w1_a": K1A, "lokr_w1_b": K1B, "lokr_w2_a": K2A, "lokr_w2_b": K2B}),
        {f"{Q}.weight": torch.kron(K1A @ K1B, K2A @ K2B)},
    ),
    "differences of weight and bias": (
        named({"diff": D[f"{Q}.weight"], "diff_b": D[f"{Q}.bias"]}),
        {f"{Q}.weight": D[f"{Q}.weight"], f"{Q}.bias": D[f"{Q}.bias"]},
    ),
    "differences, kohya's names": (named({"diff_b": D[f"{Q}.bias"]}, KOHYA), {f"{Q}.bias": D[f"{Q}.bias"]}),
    "a norm's difference": (
        named({"w_norm": D["blocks.0.norm3.weight"]}, "blocks.0.norm3"),
        {"blocks.0.norm3.weight": D["blocks.0.norm3.weight"]},
    ),
    "a convolution's": (named({"diff": D["conv.weight"]}, "conv"), {"conv.weight": D["conv.weight"]}),
    "a modulation's": (
        named({"diff": D["blocks.0.modulation"]}, "lora_unet_blocks_0_modulation"),
        {"blocks.0.modulation": D["blocks.0.modulation"]},
    ),
    "LoRA with differences, as distilled ones are": (
        named(PAIR | {"diff_b": D[f"{Q}.bias"]}, alpha=1.0) | named({"diff": D["conv.weight"]}, "diffusion_model.conv"),
        {f"{Q}.weight": 0.5 * B @ A, f"{Q}.bias": D[f"{Q}.bias"], "conv.weight": D["conv.weight"]},
    ),
    "LoRA and a difference of one weight": (
        named(PAIR | {"diff": D[f"{Q}.weight"]}, alpha=2.0), {f"{Q}.weight": B @ A + D[f"{Q}.weight"]}
    ),
    "LoHa in bf16": (
        named({n: t.bfloat16() for n, t in LOHA.items()}),
        {f"{Q}.weight": (W1A.bfloat16().float() @ W1B.bfloat16().float())
         * (W2A.bfloat16().float() @ W2B.bfloat16().float())},
    ),
}  # fmt: skip


@pytest.fixture
def base(tmp_path) -> TensorTable:
    save_file(BASE, tmp_path / "base.safetensors")
    return open_safetensors(tmp_path / "base.safetensors")


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


def merged(base: TensorTable, update, name: str, step: int) -> Tensor:
    """The weight with its update, a few rows at a time as a converter does it."""
    add, ref = update.adder(), base[name]
    rows = [add(ref.read_rows(i, min(step, ref.rows - i)).float(), i) for i in range(0, ref.rows, step)]
    return torch.cat(rows).view(ref.shape)


@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_what_its_formula_adds(base, tmp_path, kind, weight):
    tensors, expected = KINDS[kind]
    lora = open_lora(LoraSource(path=saved(tmp_path / "a.safetensors", tensors), weight=weight), base)
    assert set(lora.deltas) == set(expected)
    assert not lora.replaced
    for name, delta in expected.items():
        for step in (1, 5, 100):
            ours = merged(base, lora.deltas[name], name, step)
            assert torch.allclose(ours, BASE[name] + weight * delta, rtol=1e-5, atol=1e-5), (name, step)
    assert lora.summary()["merged"] == len(expected)
    assert parts_of(open_safetensors(tmp_path / "a.safetensors"))[0].kind == "lora" or "norm" in kind


def test_several_of_several_kinds_are_added(base, tmp_path):
    kinds = ["LoHa", "LoRA and a difference of one weight", "LoKr of whole factors", "differences of weight and bias"]
    sources = [
        LoraSource(path=saved(tmp_path / f"{i}.safetensors", KINDS[kind][0]), weight=i + 1.0)
        for i, kind in enumerate(kinds)
    ]
    updates, replaced = merge_loras([open_lora(source, base) for source in sources])
    expected = sum((i + 1) * KINDS[kind][1][f"{Q}.weight"] for i, kind in enumerate(kinds))
    ours = merged(base, updates[f"{Q}.weight"], f"{Q}.weight", 5)
    assert torch.allclose(ours, BASE[f"{Q}.weight"] + expected, rtol=1e-5, atol=1e-4)
    assert not replaced
    assert len(updates[f"{Q}.weight"].factors) == 5


HALF = {
    "half of LoHa": (named({n: t for n, t in LOHA.items() if n != "hada_w2_b"}), "expected all four of LoHa"),
    "half of LoKr": (named({"lokr_w1": K1}), "expected both factors of LoKr"),
    "half a product": (named({"lokr_w1": K1, "lokr_w2_a": K2A}), "expected both factors of LoKr"),
    "a factor and half a product": (
        named({"lokr_w1": K1, "lokr_w1_a": K1A, "lokr_w2": K2}), "expected both factors of LoKr"
    ),
    "two kinds": (named(LOHA | PAIR), "of several kinds"),
    "only an alpha": (named(PAIR) | {"conv.alpha": torch.tensor(1.0)}, "conv.weight has only alpha"),
    "LoHa of other widths": (named(LOHA | {"hada_w2_b": some(R, IN + 1)}), "do not fit"),
    "LoHa of other ranks": (named(LOHA | {"hada_w2_b": some(R + 1, IN)}), "do not fit"),
    "LoHa of a convolution": (named(LOHA, "conv"), "do not fit conv.weight"),
    "LoKr of other widths": (named({"lokr_w1": K1, "lokr_w2": some(4, 5)}), "Kronecker product has the base's shape"),
    "LoKr of a convolution": (named({"lokr_w1": some(2, 1), "lokr_w2": some(2, 3, 1, 2)}, "conv"), "do not fit"),
    "a product that is none": (
        named({"lokr_w1": K1, "lokr_w2_a": K2A, "lokr_w2_b": some(R + 1, 4)}), "do not fit"
    ),
    "a difference of another shape": (named({"diff": some(OUT, IN + 1)}), "has shape [12, 9]"),
    "a difference of what is not there": (named({"diff": some(3)}, "blocks.7.x"), "match nothing"),
    "a bias of what has none": (named({"diff_b": some(4)}, "conv"), "match nothing"),
    "a difference in codes": (named({"diff": torch.ones(OUT, IN, dtype=torch.int8)}), "is I8, and no scale"),
    "two names of one difference": (named({"diff": some(8), "w_norm": some(8)}, "blocks.0.norm3"), "two diff"),
    "one tensor under two prefixes": (
        {f"{Q}.bias": some(OUT), f"transformer.{Q}.bias": some(OUT)}, "twice, under other prefixes"
    ),
    "a stray key": (named(PAIR) | {f"{Q}.fancy": some(3)}, "match nothing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HALF)
def test_no_key_is_passed_over(base, tmp_path, kind):
    tensors, said = HALF[kind]
    with refusal(CheckpointError, "a.safetensors", said):
        open_lora(LoraSource(path=saved(tmp_path / "a.safetensors", tensors)), base)


def test_alphas_that_scale_nothing_are_said(base, tmp_path, caplog):
    tensors = named({"diff": D[f"{Q}.weight"]}, alpha=2.0)
    with caplog.at_level(logging.WARNING):
        lora = open_lora(LoraSource(path=saved(tmp_path / "a.safetensors", tensors)), base)
    assert "1 alphas scale nothing" in caplog.text
    assert lora.alphas == {}
    assert lora.summary()["alpha"] == 0.0


def test_they_are_merged_into_an_artifact(tiny, tmp_path):
    """One of each kind into the tiny DiT, against the sums in plain torch; nothing else changes."""
    dit = load_dit(base_of(tiny.checkpoint))
    q, k, v = (f"blocks.1.self_attn.{x}" for x in "qkv")
    out, width = dit[f"{q}.weight"].shape
    loha = {n: some(*((out, R) if n.endswith("_a") else (R, width))) * 0.1 for n in LOHA}
    kron = {"lokr_w1": some(2, 2) * 0.1, "lokr_w2": some(out // 2, width // 2) * 0.1}
    parts = {
        f"{q}.weight": named(loha, q), f"{k}.weight": named(kron, k), f"{v}.bias": named({"diff_b": some(out)}, v),
        "blocks.0.modulation": named({"diff": some(*dit["blocks.0.modulation"].shape)}, "blocks.0.modulation"),
        "patch_embedding.weight": named({"diff": some(*dit["patch_embedding.weight"].shape)}, "patch_embedding"),
    }  # fmt: skip
    path = saved(tmp_path / "a.safetensors", {name: t for tensors in parts.values() for name, t in tensors.items()})
    wanted = {"precision": "fp32", "components": ("dit",)}
    converted = load_file(convert(tiny.checkpoint, tmp_path / "out", lora=f"{path}:0.5", **wanted) / "dit.safetensors")
    deltas = {
        f"{q}.weight": (loha["hada_w1_a"] @ loha["hada_w1_b"]) * (loha["hada_w2_a"] @ loha["hada_w2_b"]),
        f"{k}.weight": torch.kron(kron["lokr_w1"], kron["lokr_w2"]),
    }
    for name, tensor in dit.items():
        delta = deltas.get(name, next(iter(parts[name].values())) if name in parts else None)
        expected = tensor.float() if delta is None else tensor.float() + 0.5 * delta
        assert torch.allclose(converted[name], expected, rtol=1e-6, atol=1e-6), name
    with refusal(ConfigError, "--lora-alpha is 8", "has nothing that it scales"):
        only = saved(tmp_path / "b.safetensors", parts["blocks.0.modulation"])
        convert(tiny.checkpoint, tmp_path / "no", lora=only, lora_alpha=8.0, **wanted)
