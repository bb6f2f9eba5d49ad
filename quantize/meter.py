"""Meter of a conversion: how much of its input is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

Progress = Callable[[int, int, str], None]
_LONG_BYTES = 1 << 28


@dataclasses.dataclass
class Meter:
    """Input bytes done, told to whoever shows progress."""

    total: int
    report: Progress | None
    done: int = 0

    def checksum(self, file: Path, nbytes: int) -> None:
        """Say what else is read of a file, where that takes a while."""
        if nbytes > _LONG_BYTES:
            self.add(0, f"checksum of {file.name}")

    def add(self, nbytes: int, what: str) -> None:
        self.done += nbytes
        if self.report is not None:
            self.report(self.done, self.total, what)
