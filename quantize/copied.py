"""The parts of a checkpoint that are small and stay as they are: audio encoder and tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lowvram_kernels.errors import CheckpointError, OutputError
from lowvram_quantize.recognise import FETCH
from lowvram_quantize.source import read_json
from lowvram_quantize.tables import open_component

AUDIO_ENCODER = "audio_encoder"
TOKENIZER = "tokenizer"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spiece.model",
)


def copy_audio_encoder(source: Path, folder: Path) -> list[Path]:
    """Copy wav2vec2's configuration and weights from a folder; a ``.bin`` or ``.pth`` becomes safetensors on the way.

    Raises:
        CheckpointError: a file is missing or damaged, or a weight is not finite.
        OutputError: the disk is full or cannot be written.
    """
    target = folder / AUDIO_ENCODER
    weights = _audio_weights(source)
    target.mkdir(exist_ok=True)
    written = []
    for name in ("config.json", "preprocessor_config.json"):
        read_json(source / name)
        written.append(Path(shutil.copyfile(source / name, target / name)))
    table = open_component(weights, "audio_encoder")
    tensors = {name: _wide(ref.read()) for name, ref in table.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{table[name].file}: {name} holds NaN or infinity; fetch it again")
    _save(tensors, target / "model.safetensors")
    shutil.copymode(written[0], target / "model.safetensors")  # the library writes files that only the owner may read
    return [*written, target / "model.safetensors"]


def check_audio_encoder(source: Path) -> None:
    """Raises: CheckpointError where ``copy_audio_encoder`` would find a file missing or no JSON."""
    weights = _audio_weights(source)
    for name in ("config.json", "preprocessor_config.json"):
        read_json(source / name)
    if not weights.is_file():
        raise CheckpointError(f"{weights} is missing; {FETCH['audio_encoder']}")


def check_tokenizer(source: Path) -> None:
    """Raises: CheckpointError where there is no tokenizer.json."""
    if not (source / "tokenizer.json").is_file():
        raise CheckpointError(f"{source} holds no tokenizer.json; copy the published folder google/umt5-xxl as a whole")
    read_json(source / "tokenizer.json")


def _audio_weights(source: Path) -> Path:
    """The file of weights: under the published names, or the one file of the folder that can be weights."""
    if not source.is_dir():
        what = "a file" if source.is_file() else "missing"
        raise CheckpointError(
            f"{source} is {what}; expected a folder with wav2vec2's weights, config.json and preprocessor_config.json: "
            f"{FETCH['audio_encoder']}"
        )
    published = [source / name for name in ("model.safetensors", "pytorch_model.bin")]
    others = sorted(p for p in source.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    there = [path for path in published if path.is_file()] or others
    if len(there) > 1 and there == others:
        names = ", ".join(path.name for path in others)
        raise CheckpointError(f"{source} holds {names}; expected one file of weights: leave one there")
    return there[0] if there else published[0]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """8-bit floats as float32: the encoder computes in what is stored."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # also where the system says that the disk is full
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(path.parent).free
        raise OutputError(
            f"{path} could not be written ({' '.join(str(error).split())}): {needed} bytes needed, {free} free; free "
            "some space or check the folder's permissions, then run again"
        ) from error


def copy_tokenizer(source: Path, folder: Path) -> list[Path]:
    """Copy the tokenizer's files from a folder.

    Raises:
        CheckpointError: there is no tokenizer.json.
    """
    target = folder / TOKENIZER
    check_tokenizer(source)
    target.mkdir(exist_ok=True)
    present = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    return [Path(shutil.copyfile(source / name, target / name)) for name in present]
