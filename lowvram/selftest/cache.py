"""Cache of earlier examinations, in the user's cache folder beside the cards' rates, and the identity they hold for:
card, driver, versions and the kernels' own text."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lowvram_kernels
from lowvram.planning.measure import driver_version
from lowvram.planning.measured import cache_folder, read_cache, write_cache
from lowvram.selftest.results import Result
from lowvram_kernels import libraries
from lowvram_kernels.chips import has_triton, triton_wanted

_WHAT = "results of checks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """Of one device; ``complete`` where no check was left out."""

    results: tuple[Result, ...] = ()
    complete: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"complete": self.complete, "results": [one.to_json() for one in self.results]}


def cache_file() -> Path:
    return cache_folder() / "selftest.json"


def read(file: Path) -> dict[str, Known]:
    """What is known of each device by its identity's key; nothing, and one line of why, where the file is damaged."""
    return read_cache(file, _WHAT, _known)


def write(file: Path, known: Mapping[str, Known]) -> None:
    """Replace the file; where it cannot be written that is said and does no harm."""
    write_cache(file, _WHAT, {key: each.to_json() for key, each in known.items()})


def _known(stored: dict[str, Any]) -> Known:
    if not isinstance(stored["complete"], bool) or not isinstance(stored["results"], list):
        raise ValueError(f"expected complete and results, got {sorted(stored)}")
    return Known(results=tuple(Result.from_json(one) for one in stored["results"]), complete=stored["complete"])


@contextlib.contextmanager
def alone(file: Path) -> Iterator[None]:
    """Wait until no other process is in here: ranks that begin at once examine a card once, and the others read.

    The lock goes with its process, so that one that dies holds nobody up. Where there are no such locks, all go on.
    """
    try:
        import fcntl

        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.with_suffix(".lock").open("w")
    except (ImportError, OSError):
        yield
        return
    with lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """Of a device as results hold for it. A processor has no driver and no capability."""

    device: str
    capability: str
    driver: str
    torch: str
    triton: str
    lowvram: str
    kernels: str
    libraries: str = "none"

    @property
    def key(self) -> str:
        return " | ".join(f"{name} {value}" for name, value in dataclasses.asdict(self).items())


def identity_of(device: torch.device) -> Identity:
    cuda = device.type == "cuda"
    return Identity(
        device=torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        capability=".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else "none",
        driver=driver_version() if cuda else "none",
        torch=torch.__version__,
        # Switched off, its kernels are not examined: what is known then says nothing of runs with them.
        triton=str(importlib.import_module("triton").__version__) if has_triton() and triton_wanted() else "none",
        lowvram=version("lowvram"),
        kernels=kernels_digest(),
        libraries=", ".join(f"{name} {number}" for name, number in libraries.versions().items()) or "none",
    )


@functools.cache
def kernels_digest() -> str:
    """Of the sources of all kernels: 12 characters that change with any of them."""
    digest = hashlib.sha256()
    for folder in lowvram_kernels.__path__:
        for file in sorted(Path(folder).glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
