"""Memory of a card that libraries take beside the tensors that a plan counts: measured once, kept with its rates.

Three kinds of bytes: those that lie outside torch's allocator (the CUDA context, modules of kernels, what libraries
keep for themselves), workspaces that libraries take inside it and no plan can know from shapes, and what NCCL takes for
a group of ranks. The last is measured whenever a group is made, for the plans that follow: a plan before the run leaves
room for it, and the run plans once more with what its groups have left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch

from lowvram.planning.measured import cache_folder, read_cache, write_cache
from lowvram.planning.memory_costs import MIB
from lowvram.planning.workload import Workload
from lowvram_kernels.errors import DeviceError

log = logging.getLogger(__name__)

FLAT_BYTES = 160 * MIB
"""Reserved for it where nothing was measured: cuBLAS's workspaces (32 MiB a stream on Hopper, 8 MiB before, torch's
documentation of CUBLAS_WORKSPACE_CONFIG), modules of some twenty Triton kernels and cuDNN's plans; cuDNN takes a
convolution that needs less where there is no room for more. Not measured: a judgement."""

MODULES_BYTES = 64 * MIB
"""Of ``FLAT_BYTES`` those that modules of kernels have. Not measured: a judgement."""

SLACK_BYTES = 96 * MIB
"""Kept free beside it: small tensors that nobody counts, and what the allocator cannot join again."""

SIZES = ("704*384", "1280*720")
"""At which the VAE is run; the largest is left out where the card has no room for it."""

PARTS = ("cublas", "modules")
_LIMIT_S = 300.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutsideAllocator:
    """Bytes by part. ``context`` is taken before a process can ask how much is free, and so is in no plan. ``vae`` has
    pairs of (pixels of a frame, cuDNN's bytes for the VAE at that size)."""

    context: int
    cublas: int
    modules: int
    vae: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        for name in ("context", "cublas", "modules"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} is {value!r}, expected bytes")

    def of_vae(self, pixels: int) -> int:
        """cuDNN's bytes for frames of so many pixels: those of the next larger size that was measured; beyond all of
        them in proportion."""
        larger = [nbytes for size, nbytes in sorted(self.vae) if size >= pixels]
        if larger or not self.vae:
            return larger[0] if larger else 0
        size, nbytes = max(self.vae)
        return nbytes * pixels // size

    def reserved(self, pixels: int) -> int:
        """What a plan for frames of so many pixels leaves room for, without slack."""
        return self.cublas + self.modules + self.of_vae(pixels)


class Runner(Protocol):
    """A process with a card of its own to be measured in; replaced in tests."""

    def outside(self) -> int:
        """Bytes of the card that this process has taken so far and torch's allocator has not."""
        ...

    def run(self, part: str) -> int:
        """Do what takes a part's memory: one of ``PARTS``, or a size for the VAE. Bytes that it took inside of torch's
        allocator beside the tensors that a plan counts.

        Raises:
            torch.cuda.OutOfMemoryError: the card has no room for it.
        """
        ...


def measure_parts(runner: Runner) -> OutsideAllocator:
    """Each part is what comes on top of those before it."""
    taken = context = runner.outside()

    def part(name: str) -> int:
        nonlocal taken
        inside, before = runner.run(name), taken
        taken = max(taken, runner.outside())  # another process may have given memory back meanwhile
        return taken - before + inside

    found, kept, vae = {name: part(name) for name in PARTS}, 0, []
    for size in SIZES:
        try:
            # Of libraries, what a smaller size has left stays for the larger one.
            before = taken
            nbytes = kept + part(size)
        except torch.cuda.OutOfMemoryError:
            log.info("the VAE at %s does not fit here and was not measured", size)
            break
        kept += taken - before
        vae.append((Workload.of_size(size).pixels, nbytes))
    return OutsideAllocator(context=context, vae=tuple(vae), **found)


def outside_key(card_key: str) -> str:
    """All that these bytes depend on: the card, its driver and torch (as rates do), Triton, and our own kernels."""
    return f"{card_key} | triton {_version('triton')} | lowvram {_version('lowvram')}"


def measure_outside_allocator(
    device: torch.device,
    card_key: str,
    *,
    start: Callable[[torch.device], dict[str, Any]] | None = None,
    file: Path | None = None,
) -> OutsideAllocator:
    """Measure in a process of its own, which leaves nothing behind in this one, and keep what was found for
    ``outside_allocator``. Takes about as long as the first start of a run; ``card_key`` is ``CudaRunner.key``.

    Raises:
        DeviceError: the process failed.
    """
    found = parse_outside((start or _start)(device))
    write_outside(card_key, found, file=file)
    return found


def outside_allocator(card_key: str, *, file: Path | None = None) -> OutsideAllocator | None:
    """What was measured for a card, or None."""
    return _read(file or cache_file()).get(outside_key(card_key))


def write_outside(card_key: str, found: OutsideAllocator, *, file: Path | None = None) -> None:
    """Keep what was measured for a card."""
    file = file or cache_file()
    known = _read(file) | {outside_key(card_key): found}
    write_cache(file, "bytes outside of the allocator", {key: dataclasses.asdict(each) for key, each in known.items()})


def cache_file() -> Path:
    return cache_folder() / "outside_allocator.json"


def _read(file: Path) -> dict[str, OutsideAllocator]:
    return read_cache(file, "bytes outside of the allocator", parse_outside)


def parse_outside(values: dict[str, Any]) -> OutsideAllocator:
    """From what ``dataclasses.asdict`` and JSON made of it.

    Raises:
        KeyError, TypeError, ValueError: it is damaged.
    """
    return OutsideAllocator(**values | {"vae": _pairs(values["vae"])})


def _pairs(values: Iterable[Iterable[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((int(pixels), int(nbytes)) for pixels, nbytes in values)


_PROBE = "lowvram.selftest.library_memory_probe"


def _start(device: torch.device) -> dict[str, Any]:
    index = device.index or 0
    free, _ = torch.cuda.mem_get_info(index)  # before the other process has a context
    command = [sys.executable, "-m", _PROBE, str(index), str(free)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"what lies outside of the allocator could not be measured ({error})") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = " ".join(done.stderr.strip().splitlines()[-1:])
        raise DeviceError(
            f"what lies outside of the allocator could not be measured (exit code {done.returncode}: {last}); plans "
            "reserve a flat value for it"
        )
    return dict(json.loads(lines[-1]))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


NCCL_FLAT_BYTES = 384 * MIB
"""Of a group of ranks, where nothing was measured: a connection has 4 MiB for each of up to 32 channels (NCCL's
documentation of NCCL_BUFFSIZE and NCCL_MAX_CTAS), both ways, and NCCL's kernels. Not measured: a judgement."""

_GROUPS = "what NCCL takes"


class Taken(Protocol):
    """A card that is asked what of it is taken beside torch's allocator; replaced in tests."""

    @property
    def key(self) -> str:
        """The card's name, driver and PyTorch's version, which brings NCCL."""
        ...

    def outside(self) -> int:
        """Bytes that all processes have taken and this one's allocator has not."""
        ...


class CudaTaken:
    def __init__(self, device: torch.device, key: str):
        self._device, self.key = device, key

    def outside(self) -> int:
        torch.cuda.synchronize(self._device)
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - torch.cuda.memory_reserved(self._device)


@contextlib.contextmanager
def measuring_group(card: Taken | None, ranks: int, *, file: Path | None = None) -> Iterator[None]:
    """Keep what a ``card`` has taken beside torch's allocator within, where a group of ``ranks`` does its first
    exchange: NCCL makes its connections with it. Without a card nothing is measured."""
    if card is None:
        yield
        return
    before = card.outside()
    yield
    nbytes = card.outside() - before
    if nbytes <= 0:
        log.info("what NCCL takes cannot be told: another process has given back as much meanwhile")
        return
    file = file or groups_file()
    write_cache(file, _GROUPS, _read_groups(file) | {_group_key(card.key, ranks): nbytes})


def group_bytes(card_key: str, *, file: Path | None = None) -> tuple[tuple[int, int], ...]:
    """Pairs of (ranks of a group, bytes that NCCL took of this card for it): all that were measured."""
    known, before = _read_groups(file or groups_file()), _group_key(card_key, 0).removesuffix("0 ranks")
    found = ((key.removeprefix(before).removesuffix(" ranks"), n) for key, n in known.items() if key.startswith(before))
    return tuple(sorted((int(ranks), nbytes) for ranks, nbytes in found if ranks.isdigit()))


def groups_file() -> Path:
    return cache_folder() / "grouped.json"


def _group_key(card_key: str, ranks: int) -> str:
    return f"{card_key} | group of {ranks} ranks"


def _read_groups(file: Path) -> dict[str, int]:
    def parse(nbytes: object) -> int:
        if not isinstance(nbytes, int) or isinstance(nbytes, bool) or nbytes <= 0:
            raise ValueError(f"{nbytes!r} is no number of bytes above 0")
        return nbytes

    return read_cache(file, _GROUPS, parse)
