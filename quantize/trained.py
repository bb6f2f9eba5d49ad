"""The tiny trained model that the package carries, written out in the published layout, as ``convert`` reads it.

What it is, how it was trained and what it can do stands in ``models/tiny_face/README.md``.
"""

from __future__ import annotations

import importlib.resources
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lowvram_kernels.errors import CheckpointError, OutputError
from lowvram_quantize.slabs import sha256_file
from lowvram_quantize.synthetic import (
    BASE_FOLDER,
    DIT_FILE,
    LORA_FOLDER,
    publish,
    refuse_foreign,
    write_json,
    write_tokenizer,
)
from lowvram_quantize.synthetic_encoders import wav2vec2_preprocessor

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
DIT, LORA, VAE, TEXT, AUDIO = FILES = tuple(
    f"{name}.safetensors" for name in ("dit", "lora", "vae", "text_encoder", "audio_encoder")
)
FOLDER = "tiny_face"
_AGAIN = "install lowvram again, or fetch the file again from its repository"

Tensors = dict[str, torch.Tensor]


def write_trained(root: str | Path, *, source: Path | None = None) -> Path:
    """Write ``root/Wan2.2-S2V-14B`` and ``root/LiveAvatar/liveavatar.safetensors`` of the tiny trained model; return
    ``root``. Both folders appear whole or not at all; a checkpoint that was made here before is replaced.

    Args:
        root: folder to write in, made where it does not exist.
        source: folder of the weights; None for those of the package.

    Raises:
        CheckpointError: a file of the weights is missing or damaged.
        InputError: ``root`` holds a checkpoint that did not come from here.
        OutputError: the folder cannot be written.
    """
    if source is None:
        with importlib.resources.as_file(importlib.resources.files("lowvram_models").joinpath(FOLDER)) as folder:
            return write_trained(root, source=folder)
    root = Path(root)
    manifest = read_manifest(source)
    weights = {file: _checked(source / file, manifest["files"][file]) for file in FILES}
    refuse_foreign(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as partial:
            base, lora = Path(partial, BASE_FOLDER), Path(partial, LORA_FOLDER)
            _write_base(base, weights, manifest)
            lora.mkdir()
            shutil.copyfile(source / LORA, lora / "liveavatar.safetensors")
            publish(root, (base, lora), {"note": "the tiny trained model", "files": manifest["files"]})
    except (OSError, RuntimeError, SafetensorError) as error:  # each writer has its own for a full disk
        raise OutputError(f"{root} cannot be written: {error}; choose another folder or free some space") from error
    log.info("wrote the tiny trained checkpoint in %s", root)
    return root


def read_manifest(source: Path) -> dict[str, Any]:
    """The manifest beside the weights: ``files`` with sha256 and bytes, and the configurations of DiT and wav2vec2.

    Raises:
        CheckpointError: it is missing, no JSON, or says nothing of a file that is needed.
    """
    path = source / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        lacking = [name for name in ("files", "dit", "wav2vec2") if not isinstance(manifest[name], dict)]
        lacking += [file for file in FILES if not isinstance(manifest["files"][file]["sha256"], str)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
        raise CheckpointError(f"{path} {what}; {_AGAIN}") from error
    if lacking:
        raise CheckpointError(f"{path} says nothing usable of {lacking[0]}; {_AGAIN}")
    return manifest


def _checked(path: Path, facts: dict[str, Any]) -> Tensors:
    """The file's tensors, after its checksum."""
    try:
        found = sha256_file(path)
        if found != facts["sha256"]:
            raise CheckpointError(
                f"{path} is damaged: its sha256 is {found}, {MANIFEST} says {facts['sha256']}; {_AGAIN}"
            )
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; {_AGAIN}") from error


def _write_base(base: Path, weights: dict[str, Tensors], manifest: dict[str, Any]) -> None:
    tokenizer, audio = base / "google" / "umt5-xxl", base / "wav2vec2-large-xlsr-53-english"
    for folder in (tokenizer, audio):
        folder.mkdir(parents=True)
    write_json(base / "config.json", manifest["dit"])
    file = f"{DIT_FILE}-00001-of-00001.safetensors"
    save_file(weights[DIT], base / file, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in weights[DIT].values())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(weights[DIT], file)}
    write_json(base / f"{DIT_FILE}.safetensors.index.json", index)
    torch.save(_wide(weights[VAE]), base / "Wan2.1_VAE.pth")
    torch.save(weights[TEXT], base / "models_t5_umt5-xxl-enc-bf16.pth")
    write_tokenizer(tokenizer)
    save_file(_wide(weights[AUDIO]), audio / "model.safetensors", {"format": "pt"})
    write_json(audio / "config.json", manifest["wav2vec2"])
    write_json(audio / "preprocessor_config.json", wav2vec2_preprocessor())


def _wide(tensors: Tensors) -> Tensors:
    return {name: tensor.float() for name, tensor in tensors.items()}
