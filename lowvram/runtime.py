"""What the stages of one run share: artifact, device, clock, counts, and the layout that memory pressure may change."""

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

from lowvram.devices import choose_dtype, current
from lowvram.offload.copy_engine import Engine, engine_for
from lowvram.offload.oom import Layout, Relief
from lowvram.offload.placement import MemoryOptions
from lowvram.simulate.device import simulated_device
from lowvram_kernels.trace import trace_kernels
from lowvram_quantize.format import Artifact

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


class Runtime:
    """One artifact on one device. ``relief`` is there once it was set: when the run was laid out."""

    def __init__(self, artifact: Artifact, device: torch.device, dtype: str, memory: MemoryOptions):
        self.artifact, self.device, self.memory = artifact, device, memory
        self.dtype_name, self.dtype = dtype, choose_dtype(dtype, device)
        with current(device):
            self.engine: Engine = engine_for(device)
        self.stages = StageLog(device)
        self.kernels: dict[tuple[str, str], int] = {}
        self.cuda_graphs: dict[str, float] | None = None
        """How many graphs were captured, the seconds of it, and their replays; None where there are none."""
        self._relief: Relief | None = None

    @property
    def dit_config(self) -> dict[str, Any]:
        return self.artifact.component("dit").config

    @property
    def relief(self) -> Relief:
        """Raises: RuntimeError before the run is laid out."""
        if self._relief is None:
            raise RuntimeError("nothing is laid out yet; expected a run that has begun")
        return self._relief

    @relief.setter
    def relief(self, relief: Relief) -> None:
        self._relief = relief

    @property
    def layout(self) -> Layout:
        return self.relief.layout

    @contextlib.contextmanager
    def traced(self, name: str) -> Iterator[None]:
        """Time a stage, and count the kernels that ran in it once it succeeds."""
        with self.stages.stage(name), trace_kernels() as kernels:
            yield
        for key, count in kernels.items():
            self.kernels[key] = self.kernels.get(key, 0) + count

    def memory_report(self) -> dict[str, Any]:
        """How the run was laid out, and the bytes that crossed between host and device."""
        return {
            "options": dataclasses.asdict(self.memory),
            "layout": dataclasses.asdict(self._relief.layout) if self._relief else None,
            "given_up": self._relief.events if self._relief else [],
            "cuda_graphs": self.cuda_graphs,
            "bytes_in": self.engine.bytes_in,
            "bytes_out": self.engine.bytes_out,
            "host_memory": self.engine.host_memory(),
        }
