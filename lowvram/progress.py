"""The progress bar on stderr: clip, block, frames a second, time left and memory."""

from __future__ import annotations

from types import TracebackType

import psutil
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from lowvram.byte_sizes import gib
from lowvram.recorder import Recorder


class RunProgress:
    """Context manager around a run on ``device``; ``update`` after each block. Does nothing when not enabled."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._device = device
        self._progress = Progress(
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

    def __enter__(self) -> RunProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, recorder: Recorder) -> None:
        last = recorder.blocks[-1]
        done = sum(block.frames for block in recorder.blocks)
        seconds = last.denoise_s + last.decode_s
        self._progress.update(
            self._task,
            description=f"clip {last.clip + 1} block {last.block + 1}",
            completed=done,
            total=recorder.total_frames,
            speed=f"{last.frames / seconds:.2f} frames/s",
            memory=memory(self._device),
        )


def memory(device: torch.device) -> str:
    """Memory in use now, for a person to read: this process's, and on a GPU what PyTorch holds there."""
    text = f"RSS {gib(psutil.Process().memory_info().rss)}"
    if device.type == "cuda":
        text += f", VRAM {gib(torch.cuda.memory_reserved(device))}"
    return text


class ByteProgress:
    """Context manager for ``convert``: bytes of input done, speed and time left, on stderr."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("reading the checkpoint", total=None)

    def __enter__(self) -> ByteProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, done_bytes: int, total_bytes: int, what: str) -> None:
        self._progress.update(self._task, completed=done_bytes, total=total_bytes, description=what)
