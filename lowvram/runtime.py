"""What the stages of one run share: artifact, device, counts, a clock, the layout that memory pressure may change."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from lowvram.devices import choose_dtype, current
from lowvram.offload.copy_engine import Engine, Peaks, engine_for
from lowvram.offload.oom import Layout, Relief
from lowvram.offload.placement import MemoryOptions
from lowvram_kernels.trace import trace_kernels
from lowvram_quantize.format import Artifact

log = logging.getLogger(__name__)

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


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

    def __init__(self, engine: Engine):
        self._engine, self._device = engine, engine.device
        self.stages: dict[str, Stage] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        entry = self.stages.setdefault(name, Stage(name))
        _reset_peak_rss()
        self._engine.reset_peaks()
        begin = time.perf_counter()
        try:
            yield entry
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            entry.calls += 1
            entry.seconds += time.perf_counter() - begin
            _note_peaks(entry, self._engine.peaks())
            if entry.calls == 1:
                log.info("%s: %.2f s, peak RSS %.2f GiB", name, entry.seconds, entry.peak_rss_bytes / 2**30)

    def to_json(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(s) | {"peak_bytes": self._peak(s)} for s in self.stages.values()]

    def _peak(self, stage: Stage) -> int:
        return stage.peak_rss_bytes if self._device.type == "cpu" else stage.peak_vram_reserved_bytes


def _note_peaks(entry: Stage, peaks: Peaks | None) -> None:
    entry.peak_rss_bytes = max(entry.peak_rss_bytes, peak_rss_bytes())
    if peaks is not None:
        entry.peak_vram_allocated_bytes = max(entry.peak_vram_allocated_bytes, peaks.allocated)
        entry.peak_vram_reserved_bytes = max(entry.peak_vram_reserved_bytes, peaks.reserved)


def peak_rss_bytes() -> int:
    """Highest resident set since the last reset where Linux tells it, else the resident set now."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def _reset_peak_rss() -> None:
    # 5 resets the high-water mark; a container may forbid the write, and the peaks are the run's so far then.
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")


class Runtime:
    """One artifact on one device, whose ``engine`` is made here unless it is given, as that of a simulated device is.
    ``relief`` is there once it was set: when the run was laid out."""

    def __init__(
        self, artifact: Artifact, device: torch.device, dtype: str, memory: MemoryOptions, engine: Engine | None = None
    ):
        self.artifact, self.device, self.memory = artifact, device, memory
        self.dtype_name, self.dtype = dtype, choose_dtype(dtype, device)
        with current(device):
            self.engine: Engine = engine or engine_for(device)
        self.stages = StageLog(self.engine)
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
