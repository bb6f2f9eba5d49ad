"""Memory log: a row at every begin and end of a stage, and every half second between."""

from __future__ import annotations

import csv
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import psutil

from lowvram.memory_log.rows import COLUMNS, Row
from lowvram.offload.copy_engine import Engine
from lowvram.runtime import Stage, StageLog, peak_rss_bytes
from lowvram_kernels.errors import OutputError

EVERY_S = 0.5


def path_of_rank(path: Path, rank: int) -> Path:
    """Where a rank writes that is not the one that writes the video: beside its log, as ``log.rank3.csv``."""
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


class MemoryLog:
    """Writes while it is entered; what is written stays, however the run ends. ``stages`` tells it of theirs.

    Raises:
        OutputError: at entry, the file cannot be made. Later on what cannot be written is left out, and said at exit.
    """

    def __init__(
        self,
        path: Path,
        stages: StageLog,
        engine: Engine,
        *,
        rank: int = 0,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._path, self._stages, self._engine, self._rank = path, stages, engine, rank
        self._every_s, self._clock = every_s, clock
        self._process = psutil.Process()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._failed: OSError | None = None

    def __enter__(self) -> MemoryLog:
        try:
            # Line by line, so that what a kill leaves can be read.
            self._file = self._path.open("w", newline="", encoding="utf-8", buffering=1)
        except OSError as error:
            raise OutputError(f"--memory-log {self._path} cannot be written: {error.strerror}; name another") from error
        self._rows, self._begin = csv.writer(self._file, lineterminator="\n"), self._clock()
        self._put(COLUMNS)
        self._write("sample")
        self._stages.watched_by(self)
        self._thread = threading.Thread(target=self._sample, name="memory log", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stages.watched_by(None)
        self._over.set()
        self._thread.join()
        self._write("sample")
        try:
            self._file.close()
        except OSError as failed:
            self._failed = self._failed or failed
        if self._failed is not None and error is None:
            raise OutputError(
                f"--memory-log {self._path} could not be written to its end ({self._failed}); the video is complete: "
                "free some space for the next"
            )

    def began(self, stage: str) -> None:
        """Of a stage that begins now."""
        self._write("begin", stage)

    def ended(self, stage: Stage) -> None:
        """Of one that ends now, with the highest bytes of this call of it."""
        self._write("end", stage.name)

    def _sample(self) -> None:
        while not self._over.wait(self._every_s):
            self._write("sample")

    def _write(self, event: str, stage: str | None = None) -> None:
        there = self._engine.memory()
        peaks = self._engine.peaks() if event == "end" else None
        row = Row(
            time_s=self._clock() - self._begin,
            rank=self._rank,
            stage=self._stages.current if stage is None else stage,
            block=self._stages.block,
            event=event,
            allocated=peaks.allocated if peaks else there.allocated if there else None,
            reserved=peaks.reserved if peaks else there.reserved if there else None,
            free=there.free if there else None,
            rss=peak_rss_bytes() if event == "end" else self._process.memory_info().rss,
            pinned=self._engine.pinned_bytes(),
        )
        self._put(row.cells())

    def _put(self, cells: Sequence[str]) -> None:
        with self._lock:
            try:
                self._rows.writerow(cells)
            except OSError as error:  # a full disk costs the log, and not the video
                self._failed = self._failed or error
