"""A LoRA's names and shapes against its base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.lora import open_lora
from lowvram_quantize.source import TensorTable, open_dit, open_safetensors
from tests.quantize.checkpoints import base_of, refusal

Q, BIAS = "blocks.0.self_attn.q", "blocks.0.self_attn.q.bias"


@pytest.fixture
def base(tmp_path) -> TensorTable:
    """A layer of 6 outputs and 4 inputs, its bias, and a convolution."""
    tensors = {f"{Q}.weight": torch.ones(6, 4), BIAS: torch.ones(6), "conv.weight": torch.ones(6, 4, 3)}
    save_file(tensors, tmp_path / "base.safetensors")
    return open_safetensors(tmp_path / "base.safetensors")


@pytest.fixture
def save(tmp_path):
    def write(**tensors: torch.Tensor) -> Path:
        save_file(tensors, tmp_path / "lora.safetensors")
        return tmp_path / "lora.safetensors"

    return write


def pair(prefix: str = "", suffix: str = "", rank: int = 2, name: str = Q) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{name}.lora_A{suffix}.weight": torch.randn(rank, 4),
        f"{prefix}{name}.lora_B{suffix}.weight": torch.randn(6, rank),
    }


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("suffix", ["", ".default"])
def test_peft_names_in_their_spellings(base, save, prefix, suffix):
    tensors = pair(prefix, suffix)
    lora = open_lora(save(**tensors), 8.0, base)
    a, b = tensors.values()
    scaled_b, loaded_a = lora.deltas[f"{Q}.weight"].load()
    assert torch.equal(loaded_a, a)
    assert torch.equal(scaled_b, 4.0 * b)  # alpha / r = 8 / 2
    assert not lora.replaced


def test_factors_are_float32_whatever_they_are_stored_in(base, save):
    tensors = {name: tensor.bfloat16() for name, tensor in pair().items()}
    b, a = open_lora(save(**tensors), 3.0, base).deltas[f"{Q}.weight"].load()
    assert b.dtype == a.dtype == torch.float32
    assert torch.equal(b, 1.5 * tensors[f"{Q}.lora_B.weight"].float())


def test_whole_tensors_replace_the_base(base, save):
    lora = open_lora(save(**{f"base_model.model.{BIAS}": torch.zeros(6)}), 8.0, base)
    assert list(lora.replaced) == [BIAS]
    assert lora.replaced[BIAS].file.name == "lora.safetensors"
    assert not lora.deltas


def test_summary_counts_what_changes(base, save):
    lora = open_lora(save(**pair(), **{BIAS: torch.zeros(6)}), 2.5, base)
    assert lora.summary() == {
        "file": "lora.safetensors", "alpha": 2.5, "ranks": [2], "merged": 1, "replaced": 1
    }  # fmt: skip


def test_the_published_layout_matches_its_base(tiny):
    lora = open_lora(tiny.lora, 2.0, open_dit(base_of(tiny.checkpoint)))
    assert len(lora.deltas) * 2 + len(lora.replaced) == len(load_file(tiny.lora))
    assert {delta.factor for delta in lora.deltas.values()} == {2.0 / lora.summary()["ranks"][0]}


def test_names_that_match_nothing(base, save):
    with refusal(CheckpointError, "lora.safetensors", "2 of 2", "other.q.weight", "expected", "use the LoRA"):
        open_lora(save(**pair(name="other.q"), **{"stray.bias": torch.ones(1)}), 8.0, base)
    with refusal(CheckpointError, "1 of 2", "other.q.weight"):
        open_lora(save(**pair(), **pair(name="other.q")), 8.0, base)
    with refusal(CheckpointError, "0 of 0", "expected"):
        open_lora(save(), 8.0, base)


@pytest.mark.parametrize("kept", ["A", "B"])
def test_half_a_pair(base, save, kept):
    tensors = {name: t for name, t in pair().items() if f"lora_{kept}" in name}
    with refusal(CheckpointError, f"{Q}.weight", f"only lora_{kept}", "expected lora_A and lora_B", "fetch"):
        open_lora(save(**tensors), 8.0, base)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((2, 5), (6, 2)),
        ((2, 4), (7, 2)),
        ((2, 4), (6, 3)),
        ((4, 2), (2, 6)),
        ((2, 4, 1), (6, 2, 1)),
        ((0, 4), (6, 0)),
    ],
)
def test_shapes_that_do_not_fit(base, save, a, b):
    tensors = {f"{Q}.lora_A.weight": torch.zeros(a), f"{Q}.lora_B.weight": torch.zeros(b)}
    with refusal(CheckpointError, str(list(a)), str(list(b)), f"{Q}.weight [6, 4]", "expected", "use the LoRA"):
        open_lora(save(**tensors), 8.0, base)


def test_a_pair_for_what_is_no_matrix(base, save):
    with refusal(CheckpointError, "conv.weight [6, 4, 3]"):
        open_lora(save(**pair(name="conv")), 8.0, base)


def test_a_replacement_of_another_shape(base, save):
    with refusal(CheckpointError, BIAS, "[5]", "[6]", "use the LoRA"):
        open_lora(save(**{BIAS: torch.zeros(5)}), 8.0, base)


def test_two_adapters_are_not_mixed(base, save):
    with refusal(CheckpointError, "two lora_", f"{Q}.weight", "expected one adapter"):
        open_lora(save(**pair(suffix=".default"), **pair(suffix=".other")), 8.0, base)


def test_a_file_that_is_missing_or_none(base, tmp_path):
    with refusal(CheckpointError, "gone.safetensors", "missing"):
        open_lora(tmp_path / "gone.safetensors", 8.0, base)
    (tmp_path / "text.safetensors").write_text("no LoRA at all, but long enough")
    with refusal(CheckpointError, "text.safetensors", "no safetensors file"):
        open_lora(tmp_path / "text.safetensors", 8.0, base)
