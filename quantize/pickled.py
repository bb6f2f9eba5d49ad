"""``.pth`` files as tables of tensors. Nothing in them is executed: they are opened with ``weights_only=True`` on
fake tensors, which carry the place of their bytes in the file; torch.save's older form is in ``pickled_legacy``.
"""

from __future__ import annotations

import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.pickled_legacy import BEGIN, address, load_legacy
from lowvram_quantize.source import READABLE, TensorRef, TensorTable
from lowvram_quantize.strange import refuse_strange

Tensor = torch.Tensor

# Where the bytes of a named tensor's storage begin; None where it has no such place.
_Places = Callable[[str, Tensor], int | None]

# PyTorch Lightning ("state_dict"), DeepSpeed ("module"), the usual hand-written training loops (the others).
_WRAPPERS = (
    "state_dict", "model_state_dict", "model", "module", "ema", "model_ema", "params", "params_ema", "generator",
    "generator_ema",
)  # fmt: skip


def open_pth(path: Path) -> TensorTable:
    """The tensors of a ``.pth`` dictionary, or of the one it wraps, without loading them.

    Raises:
        CheckpointError: missing, truncated, repacked, not a dictionary of dense tensors, or one that would execute
            code.
    """
    refuse_strange(path)
    try:
        loaded, places = _load_legacy(path) if _is_legacy(path) else _load_zip(path)
        loaded = _unwrapped(path, loaded)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle makes the unpickler raise nearly anything
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{path} is no plain dictionary of tensors, or damaged ({reason}); nothing in a file is run: fetch the "
            "published one"
        ) from error
    values = list(loaded.values()) if isinstance(loaded, Mapping) else []
    if not values or not all(isinstance(value, Tensor) for value in values):
        inside = ", ".join(sorted({type(value).__name__ for value in values})) or "nothing"
        what = f"{type(loaded).__name__} of {inside}" if isinstance(loaded, Mapping) else type(loaded).__name__
        raise CheckpointError(
            f"{path} holds a {what}; expected a dictionary of names to tensors: fetch the published file"
        )
    return {str(name): _pth_ref(path, str(name), tensor, places) for name, tensor in loaded.items()}


def _is_legacy(path: Path) -> bool:
    """Which of torch.save's two forms it is of.

    Raises:
        CheckpointError: it is of neither.
    """
    with path.open("rb") as file:
        head = file.read(len(BEGIN))
    if head == BEGIN:
        return True
    if zipfile.is_zipfile(path):
        return False
    advice = "load it where it is trusted and save its state_dict() with safetensors, or fetch the published file"
    if tarfile.is_tarfile(path):
        raise CheckpointError(f"{path} is a tar file, as torch.save wrote before 0.4, which is not read; {advice}")
    if len(head) > 1 and head[0] == 0x80 and head[1] in range(2, 6):
        raise CheckpointError(f"{path} is a pickle that torch.save did not write, which is not read; {advice}")
    raise CheckpointError(f"{path} is no .pth file, or is truncated; fetch it again")


def _load_zip(path: Path) -> tuple[Any, _Places]:
    with FakeTensorMode():
        loaded = torch.load(path, weights_only=True, map_location="cpu")
    records = _stored_records(path)

    def place(name: str, tensor: Tensor) -> int | None:
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        # torch computes the place from its own layout, so in a file that something else has packed it would be wrong.
        if start is not None and records.get(start) != tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: the bytes of {name} are not where torch.save puts them: it was packed again by another "
                "program; fetch the published file"
            )
        return start

    return loaded, place


def _load_legacy(path: Path) -> tuple[Any, _Places]:
    loaded, begins = load_legacy(path)
    return loaded, lambda _name, tensor: begins.get(address(tensor.untyped_storage()))


def _unwrapped(path: Path, loaded: Any) -> Any:
    """What lies under the names that training programs put a state dict under, at any depth.

    Raises:
        CheckpointError: there are several, as of a model and its running average.
    """
    while isinstance(loaded, Mapping) and not any(isinstance(value, Tensor) for value in loaded.values()):
        inside = [key for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)]
        if not inside:
            break
        if len(inside) > 1:
            raise CheckpointError(
                f"{path} holds several models, under {' and '.join(map(repr, inside))}; expected one: save that one "
                "alone, or fetch the published file"
            )
        loaded = loaded[inside[0]]
    return loaded


def _stored_records(path: Path) -> dict[int, int]:
    """Where the uncompressed members of a zip file have their bytes: offset -> number of bytes."""
    records = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            if info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset + 26)
                name_nbytes, extra_nbytes = struct.unpack("<HH", file.read(4))
                records[info.header_offset + 30 + name_nbytes + extra_nbytes] = info.file_size
    return records


def _pth_ref(path: Path, name: str, tensor: Tensor, places: _Places) -> TensorRef:
    plain = tensor.layout is torch.strided and tensor.dtype in READABLE.values() and tensor.is_contiguous()
    start = places(name, tensor) if plain else None
    if start is None:
        raise CheckpointError(f"{path}: {name} is no contiguous tensor of a known dtype; fetch the published file")
    offset = start + int(tensor.storage_offset()) * tensor.element_size()
    return TensorRef(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), file=path, offset=offset)
