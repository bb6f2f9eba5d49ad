"""A file of weights as a table of tensors that are read one stretch at a time.

Nothing is mapped: mapped pages would count as resident, and a converter is to run in little memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.slabs import DTYPES, read_header
from lowvram_quantize.strange import refuse_strange

Tensor = torch.Tensor

BASE_FOLDER = "Wan2.2-S2V-14B"
DIT_STEM = "diffusion_pytorch_model"
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
AUDIO_ENCODER_FOLDER = "wav2vec2-large-xlsr-53-english"
TOKENIZER_FOLDER = "google/umt5-xxl"

# What files of weights may hold beyond what an artifact stores: another 8-bit float, and what only marks something.
READABLE = DTYPES | {"F8_E5M2": torch.float8_e5m2, "I16": torch.int16, "BOOL": torch.bool}
# Of safetensors' dtypes those that only packed formats use.
_CODES = dict.fromkeys(("F8_E8M0", "F6_E2M3", "F6_E3M2", "F4"), ", as in mxfp8, mxfp4 and nvfp4")
_NAMES = {dtype: name for name, dtype in READABLE.items()}


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

    @property
    def kind(self) -> str:
        """How the file stores it."""
        return _NAMES.get(self.dtype, str(self.dtype))

    @property
    def scales(self) -> tuple[TensorRef, ...]:
        """Tensors beside it that its values are made with."""
        return ()

    def read(self) -> Tensor:
        """The whole tensor, read into memory of its own."""
        return self.read_rows(0, self.rows).view(self.shape)

    def read_rows(self, start: int, count: int) -> Tensor:
        """Rows of dimension 0, everything behind it flattened: [count, numel / rows] of ``dtype``.

        Raises:
            CheckpointError: the file cannot be read or ends too early.
        """
        width = math.prod(self.shape[1:])
        nbytes = count * width * self.dtype.itemsize
        if not nbytes:  # no bytes cannot be viewed as another dtype
            return torch.empty(count, width, dtype=self.dtype)
        raw = self.read_bytes(start * width * self.dtype.itemsize, nbytes)
        return torch.from_numpy(raw).view(self.dtype).view(count, width)

    def read_bytes(self, start: int, nbytes: int) -> np.ndarray:
        """``nbytes`` as uint8, from byte ``start`` of the tensor on."""
        try:
            with self.file.open("rb", buffering=0) as file:
                raw = np.fromfile(file, np.uint8, nbytes, offset=self.offset + start)
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read: {error}; check the disk and fetch it again") from error
        if raw.size != nbytes:
            raise CheckpointError(f"{self.file} is truncated: it ends within {self.name}; fetch it again")
        if (told := _told.get()) is not None:
            told(self.file, self.offset + start, raw)
        return raw


TensorTable = dict[str, TensorRef]

Told = Callable[[Path, int, np.ndarray], None]
"""Is given the file, the offset and the bytes of what a tensor reads, before anybody else has them."""
_told: ContextVar[Told | None] = ContextVar("told", default=None)


@contextlib.contextmanager
def telling(told: Told) -> Iterator[None]:
    """Tell of all that this thread's tensors read within."""
    token = _told.set(told)
    try:
        yield
    finally:
        _told.reset(token)


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
    refuse_strange(path)
    header, data_offset = read_header(path)
    header.pop("__metadata__", None)
    table = {}
    for name, facts in header.items():
        if facts["dtype"] not in READABLE:
            what = _CODES.get(facts["dtype"], "")
            raise CheckpointError(
                f"{path}: {name} has dtype {facts['dtype']}{what}; read are {', '.join(READABLE)}: fetch an edition in "
                "bf16, fp8 or GGUF"
            )
        ref = TensorRef(
            name=name,
            dtype=READABLE[facts["dtype"]],
            shape=tuple(facts["shape"]),
            file=path,
            offset=data_offset + facts["data_offsets"][0],
        )
        if ref.nbytes != facts["data_offsets"][1] - facts["data_offsets"][0]:
            raise CheckpointError(f"{path}: {name} has {facts} in the header, which does not add up; fetch it again")
        table[name] = ref
    _check_apart(path, table)
    return table


def _check_apart(path: Path, table: TensorTable) -> None:
    refs = sorted((ref for ref in table.values() if ref.nbytes), key=lambda ref: ref.offset)
    for first, second in itertools.pairwise(refs):
        if first.offset + first.nbytes > second.offset:
            raise CheckpointError(f"{path}: {first.name} and {second.name} lie in the same bytes; fetch it again")


def open_index(index: Path) -> TensorTable:
    """The tensors of several shards that lie beside their index.

    Raises:
        CheckpointError: a shard is missing or truncated, or the index names a tensor that its shard does not hold.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of names to shards; fetch it again")
    shards = {shard: open_safetensors(index.parent / Path(shard).name) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{index} names {name}, which {shard} does not hold; fetch both again")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def fitted(table: TensorTable, expected: Mapping[str, tuple[int, ...]]) -> TensorTable:
    """The table with folded tensors in their shapes again: GGML knows 4 dimensions, so GGUF files hold convolutions
    over time with fewer. The first dimension and the number of values have to agree."""
    return {
        name: dataclasses.replace(ref, shape=tuple(expected[name]))
        if name in expected and len(ref.shape) != len(expected[name]) and _same_rows(ref.shape, expected[name])
        else ref
        for name, ref in table.items()
    }


def _same_rows(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) > 1 and shape[0] == wanted[0] and math.prod(shape) == math.prod(wanted)


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
        if not table[name].dtype.is_floating_point:
            raise CheckpointError(
                f"{what}: {name} in {table[name].file} is {table[name].kind}, and no scale lies beside it; expected "
                "weights, not codes: fetch its bf16, fp8 or GGUF edition"
            )
