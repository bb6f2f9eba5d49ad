"""What is no checkpoint of this model: another one, a file that is none, a folder without it; each is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lowvram_kernels.errors import CheckpointError, ConfigError
from lowvram_quantize.convert import convert
from lowvram_quantize.source import TEXT_ENCODER_FILE, VAE_FILE
from tests.quantize.checkpoints import base_of, refusal
from tests.quantize.repackaged import (
    dit_of,
    hugging_face_cache,
    prefixed,
    save,
)


def small(name: str, *shape: int) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape)}


WAN = small("blocks.0.self_attn.q.weight", 8, 8)
FOREIGN = {
    "T2V": (WAN | small("patch_embedding.weight", 8, 16, 1, 2, 2), "a Wan T2V model"),
    "I2V": (WAN | small("patch_embedding.weight", 8, 36, 1, 2, 2), "a Wan I2V model"),
    "I2V of 2.1": (WAN | small("img_emb.proj.1.weight", 8, 8), "a Wan I2V model"),
    "TI2V": (WAN | small("patch_embedding.weight", 8, 48, 1, 2, 2), "a Wan TI2V model"),
    "VACE": (prefixed("model.diffusion_model.", WAN | small("vace_blocks.0.after_proj.weight", 8, 8)), "a Wan VACE"),
    "Animate": (WAN | small("face_adapter.fuser_blocks.0.linear1_kv.weight", 8, 8), "a Wan Animate"),
    "diffusers": (small("blocks.0.attn1.to_q.weight", 8, 8), "diffusers' layout"),
    "FLUX": (small("double_blocks.0.img_attn.qkv.weight", 8, 8), "FLUX"),
    "a LoRA": (small("blocks.0.self_attn.q.lora_A.weight", 8, 8), "a LoRA"),
    "the text encoder": (
        small("blocks.0.attn.q.weight", 8, 8) | small("blocks.1.pos_embedding.embedding.weight", 8, 8),
        "holds the UMT5-XXL encoder",
    ),
    "something": (small("what.ever", 3), "1 tensors as 'what.ever'"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_dit_that_is_another_model_is_named(tiny, tmp_path, what):
    tensors, said = FOREIGN[what]
    with refusal(CheckpointError, said, "expected the DiT of Wan2.2-S2V-14B", "fetch Wan2.2-S2V-14B's"):
        convert(
            tiny.checkpoint, tmp_path / "out", dit_file=save(tmp_path / "x.safetensors", tensors), components=("dit",)
        )


@pytest.mark.parametrize(
    ("option", "tensors", "said"),
    [
        ("vae_file", small("encoder.conv1.weight", 8, 12, 3, 3, 3) | small("decoder.conv1.weight", 8, 48, 3, 3, 3),
         "VAE of 48 channels (of Wan 2.2 TI2V-5B"),
        ("vae_file", small("encoder.conv_in.weight", 8, 3, 3, 3), "the VAE of an image model"),
        ("vae_file", WAN, "a Wan model"),
        ("text_encoder_file", small("encoder.block.0.layer.0.SelfAttention.q.weight", 8, 8), "no UMT5"),
        ("text_encoder_file", small("text_model.encoder.layers.0.mlp.fc1.weight", 8, 8), "a CLIP text encoder"),
        ("text_encoder_file", small("model.layers.0.self_attn.q_proj.weight", 8, 8), "a language model"),
    ],
)  # fmt: skip
def test_an_encoder_that_is_another_is_named(tiny, tmp_path, option, tensors, said):
    path = save(tmp_path / "x.safetensors", tensors)
    component = option.removesuffix("_file")
    with refusal(CheckpointError, "x.safetensors", said, "expected", "fetch"):
        convert(tiny.checkpoint, tmp_path / "out", **{option: path}, components=(component,))


def lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9876543\n")


def page(path: Path) -> None:
    path.write_text("\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>" * 40)


def part(path: Path) -> None:
    path.with_name(path.name + ".part").write_bytes(bytes(100))


def incomplete(path: Path) -> None:
    path.with_name(path.name + ".incomplete").write_bytes(bytes(100))


def aria2(path: Path) -> None:
    path.write_bytes(bytes(100))
    path.with_name(path.name + ".aria2").write_bytes(bytes(10))


def dangling(path: Path) -> None:
    path.symlink_to("../../blobs/0123")


def truncated(path: Path) -> None:
    path.write_bytes(save(path, dit_of_ones()).read_bytes()[:-50])


def dit_of_ones() -> dict[str, torch.Tensor]:
    return {"blocks.0.self_attn.q.weight": torch.ones(80, 80)}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lfs, "a Git LFS pointer of a file of 9876543 bytes"),
        (page, "a web page"),
        (part, "x.safetensors.part is an unfinished download"),
        (incomplete, "x.safetensors.incomplete is an unfinished download"),
        (aria2, "x.safetensors.aria2 lies beside it"),
        (dangling, "a link to ../../blobs/0123"),
        (truncated, "truncated"),
        (lambda path: None, "x.safetensors is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("option", ["dit_file", "vae_file"])
def test_a_file_that_is_none_is_named(tiny, tmp_path, option, make, said):
    path = tmp_path / "x.safetensors"
    make(path)
    with refusal(CheckpointError, "x.safetensors", said):
        convert(tiny.checkpoint, tmp_path / "out", **{option: path}, components=(option.removesuffix("_file"),))


def diffusers_layout(folder: Path) -> None:
    (folder / "model_index.json").write_text("{}")


def two_experts(folder: Path) -> None:
    (folder / "high_noise_model").mkdir()


def nothing(folder: Path) -> None:
    pass


def two_dits(folder: Path) -> None:
    for name in ("a", "b"):
        save(folder / f"{name}.safetensors", prefixed("model.", WAN | small("casual_audio_encoder.weights", 2)))


def only_others(folder: Path) -> None:
    save(folder / "t2v.safetensors", WAN | small("patch_embedding.weight", 8, 16, 1, 2, 2))


def an_lfs_pointer(folder: Path) -> None:
    lfs(folder / "s2v.safetensors")


def a_shard_alone(folder: Path) -> None:
    save(folder / "diffusion_pytorch_model-00001-of-00004.safetensors", WAN)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (diffusers_layout, ["diffusers' layout", "fetch Wan2.2-S2V-14B"]),
        (two_experts, ["T2V or I2V model of Wan 2.2", "fetch Wan2.2-S2V-14B"]),
        (nothing, ["holds no file of the DiT of Wan2.2-S2V-14B", "--dit-file", "fetch"]),
        (two_dits, ["2 times (a.safetensors, b.safetensors)", "--dit-file"]),
        (only_others, ["t2v.safetensors holds a Wan T2V model", "fetch"]),
        (an_lfs_pointer, ["a Git LFS pointer", "fetch"]),
        (a_shard_alone, ["is a shard without its index", "fetch"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_without_the_model_says_what_it_is(tmp_path, make, said):
    (tmp_path / "ckpt").mkdir()
    make(tmp_path / "ckpt")
    with refusal(CheckpointError, "ckpt", *said):
        convert(tmp_path / "ckpt", tmp_path / "out")


def test_a_dit_without_a_configuration_has_to_be_the_published_one(tiny, tmp_path):
    path = save(tmp_path / "x.safetensors", dit_of(tiny.checkpoint))
    with refusal(CheckpointError, "no config.json", "expected the folder of the published checkpoint", "put it there"):
        convert(None, tmp_path / "out", dit_file=path, components=("dit",))
    with refusal(ConfigError, "--ckpt-dir", "--dit-file"):
        convert(None, tmp_path / "out")
    with refusal(CheckpointError, "--vae-file", VAE_FILE):
        convert(None, tmp_path / "out", dit_file=path, components=("vae",))


def test_caches_that_are_not_one_model(tiny, tmp_path):
    model = hugging_face_cache(base_of(tiny.checkpoint), tmp_path / "hub")
    (model / "refs" / "main").write_text("1" * 40)
    with refusal(CheckpointError, "refs/main", "1" * 40, "fetch"):
        convert(model, tmp_path / "out")
    shutil.rmtree(model / "refs")
    (model / "snapshots" / ("2" * 40)).mkdir()
    with refusal(CheckpointError, "2 snapshots", "name one"):
        convert(model, tmp_path / "out")
    (tmp_path / "hub2" / "models--google--umt5-xxl" / "snapshots").mkdir(parents=True)
    with refusal(CheckpointError, "cache of 1 models (models--google--umt5-xxl)", "name"):
        convert(tmp_path / "hub2", tmp_path / "out")


def test_a_cut_download_in_a_cache_is_said(tiny, tmp_path):
    model = hugging_face_cache(base_of(tiny.checkpoint), tmp_path / "hub")
    blob = (model / "snapshots" / ("0" * 40) / TEXT_ENCODER_FILE).resolve()
    blob.rename(blob.with_name(blob.name + ".incomplete"))
    with refusal(CheckpointError, TEXT_ENCODER_FILE, "is a link to", "unfinished download"):
        convert(model, tmp_path / "out", components=("text_encoder",))
