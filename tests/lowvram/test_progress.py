"""Progress where stderr is a file: lines that say how far a long run is."""

from __future__ import annotations

import io
import types

import pytest
import torch
from rich.console import Console
from rich.progress import TextColumn

from lowvram import progress
from lowvram.progress import BlockProgress, ByteProgress, LoggedProgress, RunProgress

GB = 10**9


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: self.now))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [([1, 8, 0.9], 0), ([10], 1), ([9, 1, 9, 1], 2), ([100, 1], 1), ([5] * 7, 3)],
)
def test_a_line_every_ten_seconds(monkeypatch, capsys, seconds, said):
    clock = Clock(monkeypatch)
    with ByteProgress() as shown:
        for number, passed in enumerate(seconds):
            clock.now += passed
            shown.update(number * GB, 34 * GB, f"dit layer.{number}")
        lines = capsys.readouterr().err.splitlines()
    assert len(lines) == said
    assert all("31.7 GiB" in line and "dit layer." in line for line in lines)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(("done", "total"), [(1, 1), (1, 8), (7, 8), (8, 8), (120, 3000)])
def test_blocks_that_are_not_shown_are_counted(monkeypatch, capsys, done, total, enabled):
    clock = Clock(monkeypatch)
    with BlockProgress("teacher-forced", total, torch.device("cpu"), enabled=enabled) as shown:
        clock.now += 20
        shown.update(done)
        said = capsys.readouterr().err
    lines = [line.split("  ")[:2] for line in said.splitlines()]
    assert lines == ([["teacher-forced", f"{done}/{total} blocks"]] if enabled else [])


def recorder(frames: int):
    block = types.SimpleNamespace(clip=1, block=2, frames=frames, denoise_s=2.0, decode_s=1.0)
    return types.SimpleNamespace(blocks=[block], frames=frames, total_frames=2400)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_run_says_block_frames_speed_and_memory(monkeypatch, capsys, enabled):
    clock = Clock(monkeypatch)
    with RunProgress(torch.device("cpu"), enabled=enabled) as shown:
        clock.now += 20
        shown.update(recorder(12))
        said = capsys.readouterr().err
    if not enabled:
        assert said == ""
        return
    (line,) = said.splitlines()
    assert line.startswith("clip 2 block 3  12/2400 frames  4.00 frames/s  ")
    assert "RSS " in line


def test_a_terminal_has_its_bar_alone(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    clock, drawn = Clock(monkeypatch), io.StringIO()
    shown = LoggedProgress(TextColumn("{task.description}"), console=Console(file=drawn, force_terminal=True, width=60))
    task = shown.add_task("begin", total=2)
    monkeypatch.setattr(shown.console, "print", lambda *_, **__: pytest.fail("a line beside the bar"))
    clock.now += 60
    shown.show(task, completed=1, description="middle")
    assert shown.tasks[0].description == "middle"


@pytest.mark.parametrize("term", ["dumb", "unknown", "DUMB"])
def test_a_terminal_that_cannot_redraw_has_lines(monkeypatch, term):
    """There rich draws the bar only when it stops."""
    monkeypatch.setenv("TERM", term)
    clock, drawn = Clock(monkeypatch), io.StringIO()
    shown = LoggedProgress(TextColumn("{task.description}"), console=Console(file=drawn, force_terminal=True, width=60))
    task = shown.add_task("begin", total=2)
    with shown:
        for passed, words in ((60, "middle"), (1, "soon after"), (9, "end")):
            clock.now += passed
            shown.show(task, completed=1, description=words)
        assert drawn.getvalue().split() == ["middle", "end"]
