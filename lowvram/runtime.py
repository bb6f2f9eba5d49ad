"""Runtime of an artifact on a device, with its clock and its counts; and one run on it, with what was decided."""

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

from lowvram.byte_sizes import gib
from lowvram.devices import choose_dtype, current
from lowvram.offload.copy_engine import Engine, Peaks, engine_for
from lowvram.offload.kept import Kept
from lowvram.offload.oom import Ladder, Rung
from lowvram.offload.placement import MemoryOptions
from lowvram.planning.decide import Decision, Ranks, decide, staying_bytes
from lowvram.planning.members import Machines
from lowvram.planning.rank_plan import Plan
from lowvram.planning.report import to_json
from lowvram.planning.workload import Workload
from lowvram_kernels import ring_codec
from lowvram_kernels.trace import trace_kernels
from lowvram_quantize.format import Artifact

log = logging.getLogger(__name__)
plan_log = logging.getLogger("lowvram.plan")

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


class StageWatcher(Protocol):
    """Told of a stage's begin, and of its end while its peaks are still those of this call."""

    def began(self, stage: str) -> None: ...

    def ended(self, stage: Stage) -> None: ...


class StageLog:
    """Collects stages in the order of their first entry. Stages do not nest."""

    def __init__(self, engine: Engine):
        self._engine, self._device = engine, engine.device
        self.stages: dict[str, Stage] = {}
        self.current = ""
        self.block: int | None = None
        """Of the video, the one that is being made; None before the first."""
        self._watcher: StageWatcher | None = None

    def watched_by(self, watcher: StageWatcher | None) -> None:
        """Who is told of every begin and end from here on."""
        self._watcher = watcher

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        entry = self.stages.setdefault(name, Stage(name))
        _reset_peak_rss()
        self._engine.reset_peaks()
        self.current = name
        if self._watcher is not None:
            self._watcher.began(name)
        begin = time.perf_counter()
        try:
            yield entry
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            entry.calls += 1
            entry.seconds += time.perf_counter() - begin
            if self._watcher is not None:
                self._watcher.ended(entry)
            _note_peaks(entry, self._engine.peaks())
            self.current = ""
            if entry.calls == 1:
                log.info("%s: %.2f s, peak RSS %s", name, entry.seconds, gib(entry.peak_rss_bytes))

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
    """One artifact on one device, whose ``engine`` is made here unless it is given, as a simulated device's is."""

    def __init__(
        self, artifact: Artifact, device: torch.device, dtype: str, memory: MemoryOptions, engine: Engine | None = None
    ):
        self.artifact, self.device, self.memory = artifact, device, memory
        self.dtype_name, self.dtype = dtype, choose_dtype(dtype, device)
        with current(device):
            self.engine: Engine = engine or engine_for(device)
        self.stages = StageLog(self.engine)
        self.kernels: dict[tuple[str, str], int] = {}
        self.kept: Kept | None = Kept() if memory.resident else None
        self.latest: Run | None = None
        self._decided: tuple[Workload, Decision] | None = None

    @property
    def dit_config(self) -> dict[str, Any]:
        return self.artifact.component("dit").config

    def begin(
        self, work: Workload, team: Ranks, machines: Machines | None, *, steps: range, online_decode: bool
    ) -> Run:
        """A run whose everything has its place, before anything loads. ``steps`` are the denoising steps of this rank.

        On a GPU the process is capped at what was planned for: what goes beyond fails as on a card of that size, and is
        met by giving way, instead of taking memory from other programs, or spilling into the host's as Windows' driver
        lets it.

        Raises:
            OutOfMemoryError: it does not fit the budgets, and how much would.
        """
        self.cap(None)  # an earlier run of this process may have been capped lower
        found = self._decision(work, team, machines)
        self.cap(found.cap_bytes)
        if team.role.media and found.plan is not None:
            plan_log.info("%s", found.summary())
        ladder = Ladder(
            Rung(placement=found.placement, online_decode=online_decode),
            layers=self.dit_config["num_layers"],
            steps=steps,
            allowed=self.memory.fallback,
            empty_cache=self.engine.empty_cache,
        )
        self.latest = run = Run(
            runtime=self,
            ladder=ladder,
            plan=found.plan,
            with_graphs=found.cuda_graphs,
            read_before=self.artifact.read_bytes,
        )
        return run

    def _decision(self, work: Workload, team: Ranks, machines: Machines | None) -> Decision:
        """As for the video before, where it was of the same size and gave nothing up; else decided anew."""
        before, staying = self.latest, 0
        if self.kept is not None:
            if self._decided is not None and self._decided[0] == work and before and not before.ladder.events:
                return self._decided[1]
            self.engine.drop_spare()
            self.engine.empty_cache()
            if self.kept.model is not None and before is not None and before.plan is not None:
                staying = staying_bytes(self.artifact, before.plan, before.rung.placement)
        found = decide(self.artifact, work, self.device, self.memory, team, machines, staying=staying)
        self._decided = work, found
        return found

    def let_go(self) -> None:
        """Give back what stays for a next video."""
        if self.kept is not None:
            self.kept.let_go()
        self._decided = None
        self.engine.drop_spare()
        self.engine.empty_cache()

    def cap(self, nbytes: int | None) -> None:
        """Let torch's allocator take so many bytes of a GPU and no more, what it holds included; None for any."""
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(1.0 if nbytes is None else min(1.0, nbytes / total), self.device)

    def count_anew(self) -> None:
        """Stages, kernels and copies of earlier videos are not those of what comes."""
        self.stages.stages.clear()
        self.stages.block = None
        self.kernels.clear()
        self.engine.bytes_in = self.engine.bytes_out = 0

    @contextlib.contextmanager
    def traced(self, name: str) -> Iterator[None]:
        """Time a stage, and count the kernels that ran in it once it succeeds."""
        with self.stages.stage(name), trace_kernels() as kernels:
            yield
        for key, count in kernels.items():
            self.kernels[key] = self.kernels.get(key, 0) + count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One video's run: a runtime, the ladder that memory pressure steps it down, and what was planned for it.

    ``with_graphs``: layers that stay on the device are to be replayed as CUDA graphs; ``graphs`` has how many were
    captured, the seconds of it, and their replays; it is empty without graphs. ``read_before``: bytes of weights that
    this process had read when it began.
    """

    runtime: Runtime
    ladder: Ladder
    plan: Plan | None = None
    with_graphs: bool = False
    graphs: dict[str, float] = dataclasses.field(default_factory=dict)
    read_before: int = 0

    @property
    def rung(self) -> Rung:
        return self.ladder.rung


def memory_report(runtime: Runtime, run: Run | None) -> dict[str, Any]:
    """How a run was laid out, None where it was not, the version of 8-bit rings' format, and the bytes that crossed
    between host and device."""
    return {
        "options": dataclasses.asdict(runtime.memory),
        "layout": dataclasses.asdict(run.rung) if run else None,
        "kv_format": ring_codec.FORMAT if run and run.rung.placement.kv == "int8" else None,
        "given_up": run.ladder.events if run else [],
        "cuda_graphs": (run.graphs or None) if run else None,
        "bytes_in": runtime.engine.bytes_in,
        "bytes_out": runtime.engine.bytes_out,
        "host_memory": runtime.engine.host_memory(),
        "plan": to_json(run.plan) if run and run.plan else None,
        "weight_bytes_read": runtime.artifact.read_bytes - run.read_before if run else None,
    }
