"""A LoRA's names and shapes against its base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram_kernels.errors import CheckpointError, ConfigError
from lowvram_quantize.lora import LoraSource, merge_loras, open_lora
from lowvram_quantize.source import TensorTable, open_index, open_safetensors
from tests.quantize.checkpoints import INDEX, base_of, refusal

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
    lora = open_lora(LoraSource(path=save(**tensors), alpha=8.0), base)
    a, b = tensors.values()
    scaled_b, loaded_a = lora.deltas[f"{Q}.weight"].load()
    assert torch.equal(loaded_a, a)
    assert torch.equal(scaled_b, 4.0 * b)  # alpha / r = 8 / 2
    assert not lora.replaced


def test_factors_are_float32_whatever_they_are_stored_in(base, save):
    tensors = {name: tensor.bfloat16() for name, tensor in pair().items()}
    b, a = open_lora(LoraSource(path=save(**tensors), alpha=3.0), base).deltas[f"{Q}.weight"].load()
    assert b.dtype == a.dtype == torch.float32
    assert torch.equal(b, 1.5 * tensors[f"{Q}.lora_B.weight"].float())


def test_whole_tensors_replace_the_base(base, save):
    lora = open_lora(LoraSource(path=save(**{f"base_model.model.{BIAS}": torch.zeros(6)}), alpha=8.0), base)
    assert list(lora.replaced) == [BIAS]
    assert lora.replaced[BIAS].file.name == "lora.safetensors"
    assert not lora.deltas


def test_summary_counts_what_changes(base, save):
    lora = open_lora(LoraSource(path=save(**pair(), **{BIAS: torch.zeros(6)}), alpha=2.5), base)
    assert lora.summary() == {
        "file": "lora.safetensors", "weight": 1.0, "alpha": 2.5, "alphas": [2.5], "ranks": [2], "merged": 1,
        "replaced": 1,
    }  # fmt: skip


def test_the_published_layout_matches_its_base(tiny):
    lora = open_lora(LoraSource(path=tiny.lora, alpha=2.0), open_index(base_of(tiny.checkpoint) / INDEX))
    assert len(lora.deltas) * 2 + len(lora.replaced) == len(load_file(tiny.lora))
    assert {delta.factor for delta in lora.deltas.values()} == {2.0 / lora.summary()["ranks"][0]}


def test_names_that_match_nothing(base, save):
    with refusal(CheckpointError, "lora.safetensors", "2 of 2", "other.q.weight", "expected", "use the LoRA"):
        open_lora(LoraSource(path=save(**pair(name="other.q"), **{"stray.bias": torch.ones(1)}), alpha=8.0), base)
    with refusal(CheckpointError, "1 of 2", "other.q.weight"):
        open_lora(LoraSource(path=save(**pair(), **pair(name="other.q")), alpha=8.0), base)
    with refusal(CheckpointError, "0 of 0", "expected"):
        open_lora(LoraSource(path=save(), alpha=8.0), base)


@pytest.mark.parametrize("kept", ["A", "B"])
def test_half_a_pair(base, save, kept):
    tensors = {name: t for name, t in pair().items() if f"lora_{kept}" in name}
    with refusal(CheckpointError, f"{Q}.weight", f"only lora_{kept}", "expected lora_A and lora_B", "fetch"):
        open_lora(LoraSource(path=save(**tensors), alpha=8.0), base)


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
        open_lora(LoraSource(path=save(**tensors), alpha=8.0), base)


def test_a_pair_for_what_is_no_matrix(base, save):
    with refusal(CheckpointError, "conv.weight [6, 4, 3]"):
        open_lora(LoraSource(path=save(**pair(name="conv")), alpha=8.0), base)


def test_a_replacement_of_another_shape(base, save):
    with refusal(CheckpointError, BIAS, "[5]", "[6]", "use the LoRA"):
        open_lora(LoraSource(path=save(**{BIAS: torch.zeros(5)}), alpha=8.0), base)


def test_two_adapters_are_not_mixed(base, save):
    with refusal(CheckpointError, "two lora_", f"{Q}.weight", "expected one adapter"):
        open_lora(LoraSource(path=save(**pair(suffix=".default"), **pair(suffix=".other")), alpha=8.0), base)


def test_a_file_that_is_missing_or_none(base, tmp_path):
    with refusal(CheckpointError, "gone.safetensors", "missing"):
        open_lora(LoraSource(path=tmp_path / "gone.safetensors", alpha=8.0), base)
    (tmp_path / "text.safetensors").write_text("no LoRA at all, but long enough")
    with refusal(CheckpointError, "text.safetensors", "no safetensors file"):
        open_lora(LoraSource(path=tmp_path / "text.safetensors", alpha=8.0), base)


R, ALPHA = 2, 3.0
A, B = torch.randn(R, 4), torch.randn(6, R)
AB = {"lora_A.weight": A, "lora_B.weight": B}
DOWN_UP = {"lora_down.weight": A, "lora_up.weight": B}


def named(layer: str, factors: dict[str, torch.Tensor], alpha: float | None = None) -> dict[str, torch.Tensor]:
    own = {} if alpha is None else {f"{layer}.alpha": torch.tensor(alpha)}
    return {f"{layer}.{name}": tensor for name, tensor in factors.items()} | own


KOHYA = "lora_unet_blocks_0_self_attn_q"
SPELLINGS = {
    "PEFT": (named(Q, AB), 8.0 / R),
    "PEFT's prefix": (named(f"base_model.model.{Q}", AB), 8.0 / R),
    "ComfyUI": (named(f"diffusion_model.{Q}", DOWN_UP, ALPHA), ALPHA / R),
    "ComfyUI's older prefix": (named(f"model.diffusion_model.{Q}", DOWN_UP, ALPHA), ALPHA / R),
    "lora_A with an alpha": (named(f"transformer.{Q}", AB, ALPHA), ALPHA / R),
    "kohya": (named(KOHYA, DOWN_UP, ALPHA), ALPHA / R),
    "diffusers' marks": (named(f"transformer.{Q}", {"lora.down.weight": A, "lora.up.weight": B}, 1.0), 1.0 / R),
    "diffusers' layers": (named("transformer.blocks.0.attn1.to_q", AB), 8.0 / R),
    "two prefixes": (named(f"base_model.model.module.{Q}", AB), 8.0 / R),
    "bf16 alpha in a list": (named(Q, DOWN_UP) | {f"{Q}.alpha": torch.tensor([1.5]).bfloat16()}, 1.5 / R),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_spelling_is_the_same_update(base, tmp_path, spelling):
    tensors, factor = SPELLINGS[spelling]
    save_file(tensors, tmp_path / "a.safetensors")
    lora = open_lora(LoraSource(path=tmp_path / "a.safetensors", alpha=8.0), base)
    assert list(lora.deltas) == [f"{Q}.weight"]
    b, a = lora.deltas[f"{Q}.weight"].load()
    assert torch.equal(a, A)
    assert torch.equal(b, B * factor)
    assert lora.option_used is (factor == 8.0 / R)


@pytest.mark.parametrize(("factors", "factor"), [(AB, 64.0 / R), (DOWN_UP, 1.0)])
def test_without_any_alpha_it_is_what_the_spelling_implies(base, tmp_path, factors, factor):
    save_file(named(Q, factors), tmp_path / "a.safetensors")
    assert open_lora(LoraSource(path=tmp_path / "a.safetensors"), base).deltas[f"{Q}.weight"].factor == factor


def test_a_pickled_lora_and_one_in_a_wrapper(base, tmp_path):
    torch.save({"state_dict": named(Q, DOWN_UP, ALPHA)}, tmp_path / "a.pt")
    assert open_lora(LoraSource(path=tmp_path / "a.pt"), base).deltas[f"{Q}.weight"].factor == ALPHA / R


PEFT = {"peft_type": "LORA", "r": R, "lora_alpha": 6}


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        (PEFT, 3.0),
        (PEFT | {"use_rslora": True}, 6 / R**0.5),
        (PEFT | {"alpha_pattern": {"self_attn.q": 10}}, 5.0),
        (PEFT | {"alpha_pattern": {"cross_attn.q": 10}}, 3.0),
        (PEFT | {"rank_pattern": {"self_attn.q": R}, "r": 99}, 3.0),
        ({"peft_type": "LORA"}, 8 / R),
    ],
)
def test_an_adapters_configuration_scales_it(base, tmp_path, config, factor):
    save_file(named(f"base_model.model.{Q}", AB), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        lora = open_lora(LoraSource(path=path), base)
        assert lora.deltas[f"{Q}.weight"].factor == pytest.approx(factor)
        assert lora.files == [tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (PEFT | {"lora_alpha": 0}, "lora_alpha = 0"),
        (PEFT | {"lora_alpha": -4}, "lora_alpha = -4"),
        (PEFT | {"lora_alpha": float("nan")}, "lora_alpha = nan"),
        (PEFT | {"lora_alpha": "16"}, "lora_alpha = '16'"),
        (PEFT | {"alpha_pattern": {"q": 0}}, "alpha_pattern q = 0"),
        (PEFT | {"alpha_pattern": {"(": 1}}, "no regular expression"),
        (PEFT | {"use_dora": True}, "use_dora"),
        (PEFT | {"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"peft_type": "LOHA"}, "a LOHA adapter"),
    ],
)
def test_an_adapters_configuration_that_cannot_be_merged(base, tmp_path, config, said):
    save_file(named(Q, AB), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with refusal(CheckpointError, "adapter_config.json", said):
        open_lora(LoraSource(path=tmp_path), base)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_is_not_above_zero(base, tmp_path, alpha):
    save_file(named(Q, DOWN_UP, alpha), tmp_path / "a.safetensors")
    with refusal(CheckpointError, f"{Q}.alpha is {alpha}", "expected one number above 0", "fetch"):
        open_lora(LoraSource(path=tmp_path / "a.safetensors"), base)
    with refusal(ConfigError, f"--lora-alpha is {alpha}", "expected"):
        LoraSource(path=tmp_path / "a.safetensors", alpha=alpha)


OTHERS = {
    "DoRA": named(Q, AB | {"dora_scale": B.clone()}),
    "DoRA ": named(Q, AB | {"lora_magnitude_vector": torch.ones(6)}),
    "OFT": {f"{Q}.oft_blocks": torch.ones(2, 3, 3)},
    "BOFT": {f"{Q}.boft_R": torch.ones(2, 3, 3), f"{Q}.boft_S": torch.ones(6, 1)},
    "OFT, not merged": {f"{Q}.oft_R.weight": torch.ones(2, 3)},
    "LoHa of convolutions": {f"{Q}.hada_t1": A, f"{Q}.hada_w1_a": A.clone()},
    "LoKr of convolutions": {f"{Q}.lokr_t2": A},
    "GLoRA": {f"{Q}.a1.weight": A, f"{Q}.a2.weight": A.clone()},
    "IA3": {f"{Q}.ia3_l": A},
    "VeRA": {f"{Q}.vera_lambda_b": torch.ones(6)},
    "a LoRA with biases of its own": named(Q, AB | {"lora_B.bias": torch.ones(6)}),
    "whole weights": {f"{Q}.set_weight": torch.ones(6, 4)},
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_of_other_kinds_are_named(base, tmp_path, kind):
    save_file(OTHERS[kind], tmp_path / "a.safetensors")
    with refusal(CheckpointError, f"holds {kind.strip()}", "expected a LoRA", "use the LoRA"):
        open_lora(LoraSource(path=tmp_path / "a.safetensors"), base)


def test_kohya_names_that_match_nothing_are_named(base, save):
    with refusal(CheckpointError, "1 of 1", "blocks_9_self_attn_q", "use the LoRA"):
        open_lora(LoraSource(path=save(**named("lora_unet_blocks_9_self_attn_q", DOWN_UP))), base)


def test_folders_with_none_or_several_files(base, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    with refusal(CheckpointError, "lora", "0 files", "name one"):
        open_lora(LoraSource(path=folder), base)
    save_file(named(Q, AB), folder / "first.safetensors")
    assert open_lora(LoraSource(path=folder), base).file == folder / "first.safetensors"
    save_file(named(Q, AB), folder / "second.safetensors")
    with refusal(CheckpointError, "2 files", "first.safetensors, second.safetensors", "name one"):
        open_lora(LoraSource(path=folder), base)
    (folder / "first.safetensors").rename(folder / "liveavatar.safetensors")
    assert open_lora(LoraSource(path=folder), base).file == folder / "liveavatar.safetensors"


@pytest.mark.parametrize("named_by", ["the model", "its snapshots", "a snapshot", "the hub", "the home", "no ref"])
def test_a_hugging_face_cache(base, tmp_path, named_by):
    model = tmp_path / "hf" / "hub" / "models--Quark-Vision--Live-Avatar"
    file = model / "snapshots" / ("1" * 40) / "liveavatar.safetensors"
    file.parent.mkdir(parents=True)
    (tmp_path / "hf" / "hub" / "models--Wan-AI--Wan2.2-S2V-14B" / "snapshots").mkdir(parents=True)
    (model / "blobs").mkdir()
    save_file(named(Q, AB), model / "blobs" / "a")
    file.symlink_to(Path("..") / ".." / "blobs" / "a")
    if named_by != "no ref":
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text("1" * 40)
    path = {
        "the model": model, "its snapshots": model / "snapshots", "a snapshot": file.parent,
        "the hub": tmp_path / "hf" / "hub", "the home": tmp_path / "hf", "no ref": model,
    }[named_by]  # fmt: skip
    assert open_lora(LoraSource(path=path), base).file == file


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("a.safetensors:2e-1", "a.safetensors", 0.2),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:0.5", r"C:\loras\a.safetensors", 0.5),
        ("with:colon.safetensors", "with:colon.safetensors", 1.0),
        ("with:colon.safetensors:0.25", "with:colon.safetensors", 0.25),
        ("ends:1", "ends:1", 1.0),  # a file of that name is there
        ("ends:1:0.5", "ends:1", 0.5),
    ],
)
def test_a_weight_behind_the_path(tmp_path, monkeypatch, text, path, weight):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ends:1").touch()
    source = LoraSource.parse(text)
    assert (str(source.path), source.weight) == (path, weight)


@pytest.mark.parametrize("weight", ["0", "nan", "inf"])
def test_weights_that_mean_nothing(weight):
    with refusal(ConfigError, "a.safetensors", "weight", "expected"):
        LoraSource.parse(f"a.safetensors:{weight}")


def test_several_are_merged_with_their_weights(base, tmp_path):
    first, second = named(Q, AB), named(KOHYA, {"lora_down.weight": 2 * A[:1], "lora_up.weight": B[:, :1].clone()}, 4.0)
    save_file(first | {BIAS: torch.zeros(6)}, tmp_path / "a.safetensors")
    save_file(second, tmp_path / "b.safetensors")
    sources = [LoraSource(path=tmp_path / "a.safetensors"), LoraSource(path=tmp_path / "b.safetensors", weight=-0.5)]
    deltas, replaced = merge_loras([open_lora(source, base) for source in sources])
    b, a = deltas[f"{Q}.weight"].load()
    expected = 32.0 * B @ A - 0.5 * 4.0 * B[:, :1] @ (2 * A[:1])
    assert torch.allclose(b @ a, expected, rtol=1e-5, atol=1e-4)
    assert list(replaced) == [BIAS]


def test_whole_tensors_are_neither_weighted_nor_replaced_twice(base, tmp_path):
    save_file({BIAS: torch.zeros(6)}, tmp_path / "a.safetensors")
    with refusal(CheckpointError, BIAS, "a weight of 0.5", "leave it out"):
        open_lora(LoraSource(path=tmp_path / "a.safetensors", weight=0.5), base)
    lora = open_lora(LoraSource(path=tmp_path / "a.safetensors"), base)
    with refusal(CheckpointError, "a.safetensors", "both replace", BIAS, "leave one out"):
        merge_loras([lora, lora])
