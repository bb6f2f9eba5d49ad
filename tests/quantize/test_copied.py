"""Audio encoder and tokenizer: copied as they are, or refused."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lowvram_kernels.errors import CheckpointError, OutputError
from lowvram_quantize import copied
from lowvram_quantize.copied import copy_audio_encoder, copy_tokenizer
from lowvram_quantize.source import AUDIO_ENCODER_FOLDER, TOKENIZER_FOLDER
from tests.quantize.checkpoints import Payload, base_of, clone, refusal, replace, replace_pth, replace_tensors, spoil


@pytest.fixture
def base(tiny, tmp_path) -> Path:
    return base_of(clone(tiny.checkpoint, tmp_path / "ckpt"))


@pytest.fixture
def speech(base) -> Path:
    return base / AUDIO_ENCODER_FOLDER


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_the_audio_encoder_arrives_as_it_is(speech, base, out):
    written = copy_audio_encoder(base / AUDIO_ENCODER_FOLDER, out)
    assert {p.relative_to(out / "audio_encoder").as_posix() for p in written} == {
        "config.json", "preprocessor_config.json", "model.safetensors"
    }  # fmt: skip
    ours, theirs = load_file(out / "audio_encoder" / "model.safetensors"), load_file(speech / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(ours[n].dtype == t.dtype and torch.equal(ours[n], t) for n, t in theirs.items())
    assert (out / "audio_encoder" / "config.json").read_bytes() == (speech / "config.json").read_bytes()
    assert len({p.stat().st_mode for p in written}) == 1  # the weights are as readable as the rest


def test_a_pickled_audio_encoder_becomes_safetensors(speech, base, out):
    tensors = load_file(speech / "model.safetensors")
    replace(speech / "model.safetensors", None)
    torch.save(tensors, speech / "pytorch_model.bin")
    copy_audio_encoder(base / AUDIO_ENCODER_FOLDER, out)
    ours = load_file(out / "audio_encoder" / "model.safetensors")
    assert all(torch.equal(ours[n], t) for n, t in tensors.items())
    assert not (out / "audio_encoder" / "pytorch_model.bin").exists()


def test_the_same_bytes_every_time(speech, base, out):
    def copied_bytes() -> list[bytes]:
        return [p.read_bytes() for p in copy_audio_encoder(speech, out) + copy_tokenizer(base / TOKENIZER_FOLDER, out)]

    assert copied_bytes() == copied_bytes()


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_file_of_the_audio_encoder(speech, base, out, name):
    replace(speech / name, None)
    with refusal(CheckpointError, name, "fetch"):
        copy_audio_encoder(base / AUDIO_ENCODER_FOLDER, out)


def test_damaged_files_of_the_audio_encoder(speech, base, out):
    whole = (speech / "model.safetensors").read_bytes()
    replace(speech / "model.safetensors", whole[:-9])
    with refusal(CheckpointError, "model.safetensors", "truncated", "fetch"):
        copy_audio_encoder(base / AUDIO_ENCODER_FOLDER, out)
    replace(speech / "config.json", "{")
    with refusal(CheckpointError, "config.json", "JSON", "fetch"):
        copy_audio_encoder(base / AUDIO_ENCODER_FOLDER, out)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(speech, base, out, value):
    tensors = load_file(speech / "model.safetensors")
    name = sorted(tensors)[3]
    replace_tensors(speech / "model.safetensors", tensors | {name: spoil(value)(tensors[name])})
    with refusal(CheckpointError, "model.safetensors", name, "NaN or infinity", "fetch"):
        copy_audio_encoder(base / AUDIO_ENCODER_FOLDER, out)


def test_nothing_in_a_pickled_audio_encoder_is_run(speech, base, out, tmp_path):
    replace(speech / "model.safetensors", None)
    replace_pth(speech / "pytorch_model.bin", {"w": Payload(tmp_path / "was-run")})
    with refusal(CheckpointError, "pytorch_model.bin", "fetch"):
        copy_audio_encoder(base / AUDIO_ENCODER_FOLDER, out)
    assert not (tmp_path / "was-run").exists()


def test_a_disk_that_fills_under_the_weights(base, out, monkeypatch):
    def full(*_args: object) -> None:
        raise SafetensorError("Error while serializing: I/O error:\n No space left on device (os error 28)")

    monkeypatch.setattr(copied, "save_file", full)
    with refusal(OutputError, "model.safetensors", "No space left", "bytes needed", "free", "run again"):
        copy_audio_encoder(base / AUDIO_ENCODER_FOLDER, out)


def test_a_folder_that_went_away_under_the_weights(base, out, monkeypatch):
    save = copied.save_file

    def gone(tensors: dict, path: Path) -> None:
        save(tensors, path.parent / "nowhere" / path.name)

    monkeypatch.setattr(copied, "save_file", gone)
    with refusal(OutputError, "model.safetensors", "No such file"):
        copy_audio_encoder(base / AUDIO_ENCODER_FOLDER, out)


def test_the_tokenizer_arrives_as_it_is(base, out):
    written = copy_tokenizer(base / TOKENIZER_FOLDER, out)
    assert out / "tokenizer" / "tokenizer.json" in written
    for path in written:
        assert path.read_bytes() == (base / TOKENIZER_FOLDER / path.name).read_bytes()


def test_only_the_tokenizers_own_files_are_taken(base, out):
    (base / TOKENIZER_FOLDER / "tokenization.py").write_text("raise SystemExit")
    copy_tokenizer(base / TOKENIZER_FOLDER, out)
    assert not list(out.rglob("*.py"))


def test_a_tokenizer_that_is_not_there(base, out):
    replace(base / TOKENIZER_FOLDER / "tokenizer.json", None)
    with refusal(CheckpointError, TOKENIZER_FOLDER, "no tokenizer.json", "copy the published folder"):
        copy_tokenizer(base / TOKENIZER_FOLDER, out)
    replace(base / TOKENIZER_FOLDER / "tokenizer.json", "[]")
    with refusal(CheckpointError, "tokenizer.json", "list", "fetch"):
        copy_tokenizer(base / TOKENIZER_FOLDER, out)


def test_a_full_disk_is_the_systems_error_here(base, out, monkeypatch):
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):  # convert tells what it means
        copy_tokenizer(base / TOKENIZER_FOLDER, out)
