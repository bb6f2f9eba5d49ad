"""Slabs: where tensors lie in an artifact's safetensors file, its header, and checksums of its stretches.

Every slab starts at a multiple of 4096 bytes of the file, every tensor at a multiple of 16 of its slab; what is left
between them belongs to tensors named ``__pad__.N``, because safetensors allows no holes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lowvram_kernels.errors import CheckpointError
from lowvram_kernels.rounding import round_up

Tensor = torch.Tensor

SLAB_ALIGNMENT = 4096
TENSOR_ALIGNMENT = 16
PAD = "__pad__."

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor in a slab; ``offset`` counts bytes from the slab's start. ``channels_last``: dimension 1 of ``shape``
    lies innermost, in the order that convolutions want."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0
    channels_last: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the order of its bytes, which is what the file's header says."""
        return (self.shape[0], *self.shape[2:], self.shape[1]) if self.channels_last else self.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slab:
    """A stretch of a component's file; ``offset`` counts bytes from the start of the data, behind the header."""

    name: str
    offset: int
    nbytes: int
    tensors: tuple[TensorSpec, ...]


def plan_slabs(tensors: dict[str, Sequence[TensorSpec]]) -> list[Slab]:
    """Lay out slabs in the given order: wide dtypes first inside a slab, padding as tensors of its own."""
    slabs: list[Slab] = []
    begin = pads = 0
    for name, specs in tensors.items():
        placed: list[TensorSpec] = []
        end = 0

        def place(spec: TensorSpec, placed: list[TensorSpec] = placed) -> int:
            placed.append(spec)
            return spec.offset + spec.nbytes

        def pad(to: int, end: int, placed: list[TensorSpec] = placed) -> int:
            nonlocal pads
            if to > end:
                placed.append(TensorSpec(name=f"{PAD}{pads}", dtype=torch.uint8, shape=(to - end,), offset=end))
                pads += 1
            return to

        for spec in sorted(specs, key=lambda s: -s.dtype.itemsize):
            end = pad(round_up(end, TENSOR_ALIGNMENT), end)
            end = place(dataclasses.replace(spec, offset=end))
        end = pad(round_up(end, SLAB_ALIGNMENT), end)
        slabs.append(Slab(name=name, offset=begin, nbytes=end, tensors=tuple(placed)))
        begin += end
    return slabs


def header_bytes(slabs: Sequence[Slab], metadata: dict[str, str]) -> bytes:
    """The safetensors header of a plan, padded with spaces so that the data starts at a multiple of 4096 bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    for slab in slabs:
        for spec in slab.tensors:
            begin = slab.offset + spec.offset
            header[spec.name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.stored_shape),
                "data_offsets": [begin, begin + spec.nbytes],
            }
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(round_up(8 + len(text), SLAB_ALIGNMENT) - 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header and the offset at which its data starts.

    Raises:
        CheckpointError: the file is missing, is no safetensors file, or is shorter than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise CheckpointError(
                    f"{path} is no safetensors file, or is truncated: its header would have {length} bytes of {size}; "
                    "fetch or convert it again"
                )
            header = json.loads(file.read(length), object_pairs_hook=_each_once)
        ends = [_end(entry) for name, entry in header.items() if name != "__metadata__"]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the folder") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has no readable safetensors header ({error!r:.160}); fetch or convert it again"
        ) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointError(
            f"{path} has {size} bytes, its header says {expected}: it is "
            f"{'truncated' if size < expected else 'not what it was'}; fetch or convert it again"
        )
    return header, 8 + length


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError where a name stands twice, of which a dict would keep the last without a word."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found


def _end(entry: dict[str, Any]) -> int:
    """Where a header's tensor ends. Raises ValueError, KeyError or TypeError where that does not describe a tensor."""
    begin, end = entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or any(type(n) is not int or n < 0 for n in [begin, end, *entry["shape"]]):
        raise ValueError(f"{entry} describes no tensor")
    return int(end)


def pieces_of(path: Path, offset: int, nbytes: int) -> Iterator[memoryview]:
    """A stretch of a file in pieces that stay in the processor's cache; each is gone with the next.

    Raises:
        CheckpointError: the file ends before it.
    """
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while nbytes > 0:
            count = file.readinto(buffer[: min(nbytes, len(buffer))])
            if not count:
                raise CheckpointError(f"{path} ends {nbytes} bytes before it should; fetch or convert it again")
            yield buffer[:count]
            nbytes -= count


def sha256_range(path: Path, offset: int, nbytes: int) -> str:
    """SHA-256 of a stretch of a file."""
    digest = hashlib.sha256()
    for piece in pieces_of(path, offset, nbytes):
        digest.update(piece)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    return sha256_range(path, 0, path.stat().st_size)
