"""Progress on stderr: a bar on a terminal; in a file, a pipe or a dumb terminal, a line every ten seconds."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from lowvram.byte_sizes import gib
from lowvram.recorder import Recorder

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11 on

EVERY_S = 10.0


class LoggedProgress(Progress):
    """A bar of columns on a terminal that can redraw it. Elsewhere, and on a terminal with ``TERM=dumb``, rich draws it
    once, at the end, which of a run of hours is too late: there the columns' words make a line every ``EVERY_S``
    seconds, as updates come."""

    _said = 0.0

    def start(self) -> None:
        self._said = time.monotonic()
        super().start()

    def show(self, task: TaskID, **changes: Any) -> None:
        """``update``, and the line where one is due."""
        self.update(task, **changes)
        redrawn = self.console.is_terminal and not self.console.is_dumb_terminal
        if self.disable or redrawn or time.monotonic() - self._said < EVERY_S:
            return
        self._said = time.monotonic()
        now = self.tasks[self.task_ids.index(task)]
        words = [str(column(now)) for column in self.columns if not isinstance(column, str | BarColumn)]
        self.console.print("  ".join(filter(None, words)), highlight=False, markup=False, soft_wrap=True)


class _Shown:
    """A context manager that shows ``_progress`` meanwhile."""

    _progress: LoggedProgress

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class RunProgress(_Shown):
    """Context manager around a run on ``device``; ``update`` after each block. Does nothing when not enabled."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._device = device
        self._progress = LoggedProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} frames"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"),
            console=Console(stderr=True),
            disable=not enabled,
        )
        self._task = self._progress.add_task(
            "encoding portrait, voice and prompt", total=1, speed="", memory=memory(device)
        )

    def update(self, recorder: Recorder) -> None:
        last = recorder.blocks[-1]
        seconds = last.denoise_s + last.decode_s
        self._progress.show(
            self._task,
            description=f"clip {last.clip + 1} block {last.block + 1}",
            completed=recorder.frames,
            total=recorder.total_frames,
            speed=f"{last.frames / seconds:.2f} frames/s",
            memory=memory(self._device),
        )


class BlockProgress(_Shown):
    """Context manager around blocks that are denoised and not shown, or other ``units``, on ``device``; ``update``
    after each. Does nothing when not enabled."""

    def __init__(self, what: str, total: int, device: torch.device, *, enabled: bool, units: str = "blocks") -> None:
        self._device = device
        self._progress = LoggedProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[units]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"),
            console=Console(stderr=True),
            disable=not enabled,
        )
        self._task = self._progress.add_task(what, total=total, units=units, memory=memory(device))

    def update(self, done: int) -> None:
        self._progress.show(self._task, completed=done, memory=memory(self._device))


def memory(device: torch.device) -> str:
    """Memory in use now, for a person to read: this process's, and on a GPU what PyTorch holds there."""
    text = f"RSS {gib(psutil.Process().memory_info().rss)}"
    if device.type == "cuda":
        text += f", VRAM {gib(torch.cuda.memory_reserved(device))}"
    return text


class ByteProgress(_Shown):
    """Context manager for ``convert``: bytes of input done, speed and time left, on stderr."""

    def __init__(self) -> None:
        self._progress = LoggedProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("reading the checkpoint", total=None)

    def update(self, done_bytes: int, total_bytes: int, what: str) -> None:
        self._progress.show(self._task, completed=done_bytes, total=total_bytes, description=what)
