"""``.pth`` files as torch.save wrote them before 1.6: pickles one behind the other, then counts and bytes of storages.

They are read with the unpickler that is behind ``weights_only=True``, so nothing in them is executed, on tensors of the
device "meta": only where the bytes lie is taken from the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._weights_only_unpickler import Unpickler

from lowvram_kernels.errors import CheckpointError

Tensor = torch.Tensor

BEGIN = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The first of the pickles, torch.save's magic number."""
_PROTOCOL = 1001
_COUNT_NBYTES = 8


class _Storages:
    """Storages by the file's keys, without memory."""

    def __init__(self) -> None:
        self.by_key: dict[str, torch.storage.TypedStorage] = {}

    def load(self, stored: tuple[Any, ...]) -> torch.storage.TypedStorage:
        _, kind, key, _, count, view = stored
        if view is not None:
            raise ValueError("it holds views of storages, as torch wrote before 0.4")
        if key not in self.by_key:
            dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
            raw = torch.UntypedStorage(count * dtype.itemsize, device="meta")
            self.by_key[key] = torch.storage.TypedStorage(wrap_storage=raw, dtype=dtype, _internal=True)
        return self.by_key[key]


def load_legacy(path: Path) -> tuple[Any, dict[int, int]]:
    """What the file holds, with tensors on "meta", and where the bytes of each storage begin: by ``address``.

    Raises:
        CheckpointError: it ends too early or does not add up.
        Exception: nearly any, from the unpickler, for what is damaged or would execute code.
    """
    storages = _Storages()
    with path.open("rb") as file:
        _, protocol, system = (_next(file) for _ in range(3))
        if protocol != _PROTOCOL or not system.get("little_endian", True):
            raise ValueError(f"protocol {protocol} of {system}")
        unpickler = Unpickler(file, encoding="utf-8")
        unpickler.persistent_load = storages.load  # type: ignore[method-assign]  # as torch.load does it
        loaded, keys = unpickler.load(), _next(file)
        places = {}
        for key in keys:
            storage = storages.by_key[key]
            places[address(storage._untyped_storage)] = _place(path, file, storage)
    return loaded, places


def address(storage: torch.UntypedStorage) -> int:
    """Which storage it is, of those alive."""
    return int(storage._cdata)


def _next(file: BinaryIO) -> Any:
    return Unpickler(file, encoding="utf-8").load()


def _place(path: Path, file: BinaryIO, storage: torch.storage.TypedStorage) -> int:
    """Where the bytes begin that the file stands before; it is moved behind them."""
    count = int.from_bytes(file.read(_COUNT_NBYTES), "little", signed=True)
    start, nbytes = file.tell(), storage._untyped_storage.nbytes()
    if count * storage.dtype.itemsize != nbytes or start + nbytes > path.stat().st_size:
        raise CheckpointError(
            f"{path} is truncated or damaged: a storage of {nbytes} bytes is not whole; fetch it again"
        )
    file.seek(nbytes, 1)
    return start
