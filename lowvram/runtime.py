"""What the stages of one run share: artifact, device, clock, counts, and the layout that memory pressure may change."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from lowvram.devices import choose_dtype, current
from lowvram.offload.copy_engine import Engine, engine_for
from lowvram.offload.oom import Relief
from lowvram.offload.oom_ladder import Layout
from lowvram.offload.placement import MemoryOptions
from lowvram.stages import StageLog
from lowvram_kernels.trace import trace_kernels
from lowvram_quantize.format import Artifact


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
