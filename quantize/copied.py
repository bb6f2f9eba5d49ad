"""The parts of a checkpoint that are small and stay as they are: audio encoder and tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lowvram_kernels.errors import CheckpointError, OutputError
from lowvram_quantize.source import AUDIO_ENCODER_FOLDER, TOKENIZER_FOLDER, open_pth, open_safetensors, read_json

AUDIO_ENCODER = "audio_encoder"
TOKENIZER = "tokenizer"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spiece.model",
)


def copy_audio_encoder(base: Path, folder: Path) -> list[Path]:
    """Copy wav2vec2's configuration and weights; a ``pytorch_model.bin`` becomes safetensors on the way.

    Raises:
        CheckpointError: a file is missing or damaged, or a weight is not finite.
        OutputError: the disk is full or cannot be written.
    """
    source, target = base / AUDIO_ENCODER_FOLDER, folder / AUDIO_ENCODER
    target.mkdir(exist_ok=True)
    written = []
    for name in ("config.json", "preprocessor_config.json"):
        read_json(source / name)
        written.append(Path(shutil.copyfile(source / name, target / name)))
    weights, pickled = source / "model.safetensors", source / "pytorch_model.bin"
    table = open_pth(pickled) if pickled.is_file() and not weights.is_file() else open_safetensors(weights)
    tensors = {name: ref.read() for name, ref in table.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{table[name].file}: {name} holds NaN or infinity; fetch it again")
    _save(tensors, target / "model.safetensors")
    shutil.copymode(written[0], target / "model.safetensors")  # the library writes files that only the owner may read
    return [*written, target / "model.safetensors"]


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # also where the system says that the disk is full
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(path.parent).free
        raise OutputError(
            f"{path} could not be written ({' '.join(str(error).split())}): {needed} bytes needed, {free} free; free "
            "some space or check the folder's permissions, then run again"
        ) from error


def copy_tokenizer(base: Path, folder: Path) -> list[Path]:
    """Copy the tokenizer's files.

    Raises:
        CheckpointError: there is no tokenizer.json.
    """
    source, target = base / TOKENIZER_FOLDER, folder / TOKENIZER
    if not (source / "tokenizer.json").is_file():
        raise CheckpointError(f"{source} holds no tokenizer.json; copy the published folder google/umt5-xxl as a whole")
    target.mkdir(exist_ok=True)
    read_json(source / "tokenizer.json")
    present = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    return [Path(shutil.copyfile(source / name, target / name)) for name in present]
