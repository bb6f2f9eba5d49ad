"""A published checkpoint as a table of tensors that are read one stretch at a time.

Nothing is mapped: mapped pages would count as resident, and a converter is to run in little memory. Nothing in a file
is executed: ``.pth`` dictionaries are opened with ``weights_only=True`` on fake tensors, which carry the place of their
bytes in the file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.format import DTYPES, read_header

Tensor = torch.Tensor

BASE_FOLDER = "Wan2.2-S2V-14B"
DIT_STEM = "diffusion_pytorch_model"
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
AUDIO_ENCODER_FOLDER = "wav2vec2-large-xlsr-53-english"
TOKENIZER_FOLDER = "google/umt5-xxl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRef:
    """Where a tensor's bytes are: ``offset`` from the file's start, contiguous."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def read(self) -> Tensor:
        """The whole tensor, read into memory of its own."""
        return self.read_rows(0, self.rows).view(self.shape)

    def read_rows(self, start: int, count: int) -> Tensor:
        """Rows of dimension 0, everything behind it flattened: [count, numel / rows].

        Raises:
            CheckpointError: the file cannot be read or ends too early.
        """
        width = math.prod(self.shape[1:])
        nbytes = count * width * self.dtype.itemsize
        if not nbytes:  # no bytes cannot be viewed as another dtype
            return torch.empty(count, width, dtype=self.dtype)
        try:
            with self.file.open("rb", buffering=0) as file:
                raw = np.fromfile(file, np.uint8, nbytes, offset=self.offset + start * width * self.dtype.itemsize)
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read: {error}; check the disk and fetch it again") from error
        if raw.size != nbytes:
            raise CheckpointError(f"{self.file} is truncated: it ends within {self.name}; fetch it again")
        return torch.from_numpy(raw).view(self.dtype).view(count, width)


TensorTable = dict[str, TensorRef]


def find_base(ckpt_dir: Path) -> Path:
    """The folder with the DiT's config.json: ``ckpt_dir`` itself or its ``Wan2.2-S2V-14B``.

    Raises:
        CheckpointError: neither is there.
    """
    for folder in (ckpt_dir, ckpt_dir / BASE_FOLDER):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"{ckpt_dir} {'holds' if ckpt_dir.is_dir() else 'is no folder, so it holds'} no config.json, nor does "
        f"{BASE_FOLDER} in it; expected the folder of the published checkpoint"
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected a JSON object, fetch it again")
    return value


def open_safetensors(path: Path) -> TensorTable:
    """Raises: CheckpointError where the file is missing, truncated or has a dtype that is not known."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; fetch the checkpoint again")
    header, data_offset = read_header(path)
    header.pop("__metadata__", None)
    table = {}
    for name, facts in header.items():
        if facts["dtype"] not in DTYPES:
            known = ", ".join(DTYPES)
            raise CheckpointError(f"{path}: {name} has dtype {facts['dtype']}; known are {known}: fetch it again")
        ref = TensorRef(
            name=name,
            dtype=DTYPES[facts["dtype"]],
            shape=tuple(facts["shape"]),
            file=path,
            offset=data_offset + facts["data_offsets"][0],
        )
        if ref.nbytes != facts["data_offsets"][1] - facts["data_offsets"][0]:
            raise CheckpointError(f"{path}: {name} has {facts} in the header, which does not add up; fetch it again")
        table[name] = ref
    return table


def open_dit(base: Path) -> TensorTable:
    """The DiT's tensors from its shards and their index, or from the one file of a small model.

    Raises:
        CheckpointError: a shard is missing or truncated, or the index names a tensor that its shard does not hold.
    """
    index = base / f"{DIT_STEM}.safetensors.index.json"
    if not index.is_file():
        return open_safetensors(base / f"{DIT_STEM}.safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of names to shards; fetch it again")
    shards = {shard: open_safetensors(base / Path(shard).name) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{index} names {name}, which {shard} does not hold; fetch both again")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def open_pth(path: Path) -> TensorTable:
    """The tensors of a ``.pth`` dictionary, without loading them.

    Raises:
        CheckpointError: missing, truncated, repacked, not a dictionary of dense tensors, or one that would execute
            code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; fetch the checkpoint again")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is not a .pth of today's form, or is truncated; fetch it again")
    try:
        with FakeTensorMode():
            loaded = torch.load(path, weights_only=True, map_location="cpu")
        records = _stored_records(path)
    except Exception as error:  # a damaged pickle makes the unpickler raise nearly anything
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{path} is no plain dictionary of tensors ({reason}); nothing in a file is run: fetch the published one"
        ) from error
    values = list(loaded.values()) if isinstance(loaded, Mapping) else []
    if not values or not all(isinstance(value, Tensor) for value in values):
        inside = ", ".join(sorted({type(value).__name__ for value in values})) or "nothing"
        what = f"{type(loaded).__name__} of {inside}" if isinstance(loaded, Mapping) else type(loaded).__name__
        raise CheckpointError(
            f"{path} holds a {what}; expected a dictionary of names to tensors: fetch the published file"
        )
    return {str(name): _pth_ref(path, str(name), tensor, records) for name, tensor in loaded.items()}


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


def _pth_ref(path: Path, name: str, tensor: Tensor, records: dict[int, int]) -> TensorRef:
    plain = tensor.layout is torch.strided and tensor.dtype in DTYPES.values() and tensor.is_contiguous()
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if plain else None
    if start is None:
        raise CheckpointError(f"{path}: {name} is no contiguous tensor of a known dtype; fetch the published file")
    # torch computes the place from its own layout, so in a file that something else has packed it would be wrong.
    if records.get(start) != tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: the bytes of {name} are not where torch.save puts them: it was packed again by another program; "
            "fetch the published file"
        )
    offset = start + tensor.storage_offset() * tensor.element_size()
    return TensorRef(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), file=path, offset=offset)


def check_shapes(table: TensorTable, expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raises: CheckpointError where names or shapes are not those that the configuration implies."""
    missing, unknown = sorted(set(expected) - set(table)), sorted(set(table) - set(expected))
    if missing or unknown:
        raise CheckpointError(
            f"{what} lacks {len(missing)} tensors {missing[:2]} and has {len(unknown)} unknown ones {unknown[:2]}; "
            "check that config and files are of the same checkpoint"
        )
    for name, shape in expected.items():
        if table[name].shape != tuple(shape):
            raise CheckpointError(
                f"{what}: {name} in {table[name].file} has shape {list(table[name].shape)}, its configuration says "
                f"{list(shape)}; check that both are of the same checkpoint"
            )
