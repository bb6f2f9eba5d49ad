"""Seconds and peak bytes of each stage of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from lowvram.simulate.device import simulated_device

log = logging.getLogger(__name__)

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class MemoryProbe(Protocol):
    """Bytes that a device's allocator has handed out and holds, at their highest since the last reset."""

    @property
    def peak_allocated(self) -> int: ...

    @property
    def peak_reserved(self) -> int: ...

    def reset_peaks(self) -> None: ...


class CudaProbe:
    """A GPU's, as torch counts them."""

    def __init__(self, device: torch.device):
        self._device = device

    @property
    def peak_allocated(self) -> int:
        return int(torch.cuda.max_memory_allocated(self._device))

    @property
    def peak_reserved(self) -> int:
        return int(torch.cuda.max_memory_reserved(self._device))

    def reset_peaks(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)


def memory_probe(device: torch.device) -> MemoryProbe | None:
    """What tells the memory of ``device``: a GPU's, the simulated one's while it is entered; none on the CPU."""
    return CudaProbe(device) if device.type == "cuda" else simulated_device() if device.type == "meta" else None


@dataclasses.dataclass
class Stage:
    """One stage; entered ``calls`` times, ``seconds`` in all. Peaks are the highest of all calls, in bytes."""

    name: str
    calls: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    peak_vram_allocated_bytes: int = 0
    peak_vram_reserved_bytes: int = 0


class StageLog:
    """Collects stages in the order of their first entry. Stages do not nest."""

    def __init__(self, device: torch.device):
        self._device = device
        self.stages: dict[str, Stage] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        entry = self.stages.setdefault(name, Stage(name))
        probe = memory_probe(self._device)
        _reset_peaks(probe)
        begin = time.perf_counter()
        try:
            yield entry
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            entry.calls += 1
            entry.seconds += time.perf_counter() - begin
            _note_peaks(entry, probe)
            if entry.calls == 1:
                log.info("%s: %.2f s, peak RSS %.2f GiB", name, entry.seconds, entry.peak_rss_bytes / 2**30)

    def to_json(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(s) | {"peak_bytes": self._peak(s)} for s in self.stages.values()]

    def _peak(self, stage: Stage) -> int:
        return stage.peak_rss_bytes if self._device.type == "cpu" else stage.peak_vram_reserved_bytes


def _note_peaks(entry: Stage, probe: MemoryProbe | None) -> None:
    entry.peak_rss_bytes = max(entry.peak_rss_bytes, peak_rss_bytes())
    if probe is not None:
        entry.peak_vram_allocated_bytes = max(entry.peak_vram_allocated_bytes, probe.peak_allocated)
        entry.peak_vram_reserved_bytes = max(entry.peak_vram_reserved_bytes, probe.peak_reserved)


def peak_rss_bytes() -> int:
    """Highest resident set since the last reset where Linux tells it, else the resident set now."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def _reset_peaks(probe: MemoryProbe | None) -> None:
    # 5 resets the high-water mark; a container may forbid the write, and the peaks are the run's so far then.
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")
    if probe is not None:
        probe.reset_peaks()
