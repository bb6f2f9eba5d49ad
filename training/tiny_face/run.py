"""What every training here does: go on from its last checkpoint, log a line a minute, count hours that it computed."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("tiny_face")
SAVE_EVERY_S = 120.0
LOG_EVERY_S = 60.0


class Run:
    """A training's folder ``root/name``: ``state.pt`` to go on from, ``log.jsonl`` with what was measured."""

    def __init__(self, root: Path, name: str, steps: int, parts: dict[str, Any]):
        self.folder, self.steps, self.parts = root / name, steps, parts
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self.folder / "state.pt"
        self.step, self.cpu_s, self.wall_s = 0, 0.0, 0.0
        if self._file.is_file():
            state = torch.load(self._file, weights_only=True)
            self.step, self.cpu_s, self.wall_s = state["step"], state["cpu_s"], state["wall_s"]
            for part, value in state["parts"].items():
                parts[part].load_state_dict(value)
            log.warning("%s goes on from step %d of %d", name, self.step, steps)

    def loop(self, one: Callable[[int], dict[str, float]]) -> None:
        """Call ``one`` with each step that is left; the log has means of what it returns."""
        values: dict[str, list[float]] = {}
        cpu, wall, saved, logged = time.process_time(), time.monotonic(), time.monotonic(), 0.0
        while self.step < self.steps:
            for key, value in one(self.step).items():
                values.setdefault(key, []).append(value)
            self.step += 1
            now, used = time.monotonic(), time.process_time()
            self.cpu_s, self.wall_s, cpu, wall = self.cpu_s + used - cpu, self.wall_s + now - wall, used, now
            last = self.step == self.steps
            if last or now - logged > LOG_EVERY_S:
                self.note({key: sum(some) / len(some) for key, some in values.items()})
                values, logged = {}, now
            if last or now - saved > SAVE_EVERY_S:
                self.save()
                saved = now

    def note(self, values: dict[str, float]) -> None:
        line = {"step": self.step, "cpu_s": round(self.cpu_s), "wall_s": round(self.wall_s)}
        line |= {key: float(f"{value:.5g}") for key, value in values.items()}
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), file=sys.stderr, flush=True)

    def save(self) -> None:
        state = {"step": self.step, "cpu_s": self.cpu_s, "wall_s": self.wall_s}
        state["parts"] = {name: part.state_dict() for name, part in self.parts.items()}
        partial = self._file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self._file)


def machine() -> str:
    """The processor, for the log."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"
