"""What people give in place of an artifact: named, with what makes one of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.convert import convert
from lowvram_quantize.format import MANIFEST, Artifact
from tests.quantize.checkpoints import base_of

# A lower bound of what every message has to do: say what came, and what to do next.
NEXT = ("expected the folder that lowvram convert makes", "lowvram convert", "give ", "check ", "run ")


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        Artifact.open(path)
    said = str(error.value)
    assert any(words in said for words in NEXT), said
    assert "\n" not in said
    return said


@pytest.fixture
def artifact(tiny, tmp_path) -> Path:
    (tmp_path / "above").mkdir()
    return shutil.copytree(tiny.artifact("int8"), tmp_path / "above" / "tiny")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("gone", ["gone is not there"]),
        ("models/deep/gone", ["is not there, and neither is models"]),
        ("Tiny-Int8", ["Tiny-Int8 is not there; tiny-int8 is"]),
        ("tiny-int9", ["tiny-int9 is not there; tiny-int8 is"]),
        ("dangling", ["is a link to away, which is not there"]),
        ("Quark-Vision/Live-Avatar", ["the name of a model on Hugging Face", "download Quark-Vision/Live-Avatar "]),
        ("Wan-AI/Wan2.2-S2V-14B", ["name of a model on Hugging Face", "nothing is fetched here"]),
        ("Wan-AI/Wan2.2-S2V-14B@main", ["download Wan-AI/Wan2.2-S2V-14B "]),
        ("somebody/some-model", ["neither is somebody", "where it is a name on Hugging Face"]),
        ("ckpt/Wan2.2-S2V-14B", ["is not there, and neither is ckpt; check the path"]),
        ("https://huggingface.co/Quark-Vision/Live-Avatar", ["fetch https://huggingface.co/Quark-Vision/Live-Avatar"]),
        ("hf://Quark-Vision/Live-Avatar", ["is an address"]),
        ("~/models/tiny", ["within quotes", str(Path.home() / "models" / "tiny")]),
        ("half", ["half.partial is what it has so far", "run the same convert again"]),
        ("x" * 300, ["File name too long"]),
    ],
)
def test_what_is_not_there_is_said_to_be_not_there(tmp_path, monkeypatch, text, parts):
    monkeypatch.chdir(tmp_path)
    Path("tiny-int8").mkdir()
    Path("dangling").symlink_to("away")
    Path("half.partial").mkdir()
    said = refused(Path(text))
    assert all(part in said for part in parts), said
    assert MANIFEST not in said


def touched(*names: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        return folder

    return make


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (touched(), ["an empty folder"]),
        (touched("notes.txt", "README.md"), ["no artifact: it has no manifest.json, but README.md, notes.txt"]),
        (touched("config.json", "Wan2.1_VAE.pth"), ["a published checkpoint", "lowvram convert --ckpt-dir"]),
        (touched("diffusion_pytorch_model.safetensors.index.json"), ["a published checkpoint"]),
        (touched("Wan2.2-S2V-14B/config.json"), ["a published checkpoint"]),
        (touched("model_index.json", "vae/x.safetensors"), ["diffusers' layout"]),
        (touched("models--Wan-AI--Wan2.2-S2V-14B/refs/main"), ["a Hugging Face cache"]),
        (touched("snapshots/abc/config.json"), ["a Hugging Face cache"]),
        (touched("models/diffusion_models/wan.gguf"), ["ComfyUI"]),
        (touched("wan-s2v.gguf"), ["a folder of weights (wan-s2v.gguf)", "--ckpt-dir"]),
        (touched("liveavatar.safetensors"), ["a folder with a LoRA", "--lora"]),
        (touched("adapter_config.json", "adapter_model.safetensors"), ["a folder with a LoRA"]),
        (touched("dit.safetensors", "vae.safetensors"), ["no artifact without its manifest.json", "copied in part"]),
        (touched("wan.safetensors.part"), ["an unfinished download (wan.safetensors.part)", "let it finish"]),
    ],
)
def test_folders_of_something_else(tmp_path, make, parts):
    said = refused(make(tmp_path))
    assert all(part in said for part in parts), said
    assert "is not there" not in said


def test_the_checkpoint_itself(checkpoint):
    for folder in (checkpoint, base_of(checkpoint)):
        assert f"lowvram convert --ckpt-dir {folder} --out DIR, then give DIR" in refused(folder)


def test_a_folder_above_artifacts_names_them(artifact, tmp_path):
    assert f"holds {artifact}; give that" in refused(artifact.parent)
    shutil.copytree(artifact, tmp_path / "above" / "other")
    assert f"holds {artifact.with_name('other')}, {artifact}; give one of them" in refused(tmp_path)


def test_what_an_interrupted_convert_left(tmp_path):
    folder = touched("dit.safetensors", "dit.safetensors.journal")(tmp_path / "tiny.partial")
    assert "what an unfinished convert has made so far; run the same convert again" in refused(folder)


@pytest.mark.parametrize("name", [MANIFEST, "dit.safetensors", "audio_encoder/config.json", "tokenizer/tokenizer.json"])
def test_a_file_of_an_artifact_names_its_folder(artifact, name):
    assert f"is a file of the artifact {artifact}; give that folder" in refused(artifact / name)


def lfs(path: Path) -> Path:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n")
    return path


def weights(*names: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        save_file({name: torch.zeros(2, 2) for name in names}, path)
        return path

    return make


def text(path: Path) -> Path:
    path.write_text("no weights")
    return path


@pytest.mark.parametrize(
    ("name", "make", "parts"),
    [
        ("lora.safetensors", weights("blocks.0.q.lora_A.weight"), ["a file of a LoRA", "--lora "]),
        (
            "s2v.safetensors",
            weights("blocks.0.self_attn.q.weight", "casual_audio_encoder.x"),
            ["a file of the DiT of Wan2.2-S2V-14B", "--dit-file "],
        ),
        ("t2v.safetensors", weights("blocks.0.self_attn.q.weight"), ["a Wan model (no S2V)", "lowvram convert"]),
        ("other.safetensors", weights("model.layers.0.self_attn.q"), ["a language model"]),
        ("pointer.safetensors", lfs, ["a Git LFS pointer", "git lfs pull"]),
        ("broken.safetensors", text, ["is no safetensors file"]),
        ("model.pth", text, ["a file of weights, and no artifact"]),
        ("artifact.tar.gz", text, ["an archive; unpack it"]),
        ("artifact.zip", text, ["an archive; unpack it"]),
        ("portrait.png", text, ["a file, and no artifact"]),
    ],
)
def test_files(tmp_path, name, make, parts):
    said = refused(make(tmp_path / name))
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("Wan-AI/Wan2.2-S2V-14B", "name of a model on Hugging Face"),
        ("~/Wan2.2-S2V-14B", "within quotes"),
        ("https://huggingface.co/Wan-AI/Wan2.2-S2V-14B", "is an address"),
        ("ckpt/deep", "is not there, and neither is ckpt"),
        ("gone", "gone is not there"),
    ],
)
def test_checkpoints_that_are_not_there(tmp_path, monkeypatch, path, part):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=part):
        convert(path, "out")


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("Quark-Vision/Live-Avatar", "download Quark-Vision/Live-Avatar "),
        ("~/liveavatar.safetensors", "within quotes"),
        ("https://huggingface.co/x/liveavatar.safetensors", "is an address"),
        ("loras/liveavatar.safetensors", "is missing"),
        ("liveavatar.safetensors", "is missing"),
    ],
)
def test_loras_that_are_not_there(checkpoint, tmp_path, monkeypatch, path, part):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=part):
        convert(checkpoint, "out", lora=path)
