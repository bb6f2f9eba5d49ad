"""A run's memory log: its rows are those of the report's stages, and stay however the run ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowvram.infer import _memory_log, infer
from lowvram.memory_log.rows import Row, read_rows
from lowvram.memory_log.writer import MemoryLog, path_of_rank
from lowvram.offload.copy_engine import Engine, Held, Peaks
from lowvram.outputs import Outputs
from lowvram.pipeline import AvatarPipeline
from lowvram.runtime import StageLog
from lowvram_kernels.errors import InputError, OutputError


class Counted(Engine):
    """A device whose bytes a test sets."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.now_, self.high, self.pins = Held(allocated=1, reserved=2, free=3), Peaks(allocated=10, reserved=20), 7

    def memory(self):
        return self.now_

    def peaks(self):
        return self.high

    def pinned_bytes(self):
        return self.pins


def test_begin_end_and_samples_say_what_is_there(tmp_path):
    engine, path = Counted(), tmp_path / "a.csv"
    stages = StageLog(engine)
    with MemoryLog(path, stages, engine, rank=2, every_s=60):
        with stages.stage("load_dit"):
            engine.now_ = Held(allocated=5, reserved=6, free=0)
        stages.block = 4
        with stages.stage("denoise"):
            engine.high = Peaks(allocated=99, reserved=100)
    rows = read_rows(path)
    told = [(row.event, row.stage, row.block, row.allocated, row.reserved, row.free) for row in rows]
    assert told == [
        ("sample", "", None, 1, 2, 3),
        ("begin", "load_dit", None, 1, 2, 3),
        ("end", "load_dit", None, 10, 20, 0),
        ("begin", "denoise", 4, 5, 6, 0),
        ("end", "denoise", 4, 99, 100, 0),
        ("sample", "", 4, 5, 6, 0),
    ]
    assert all((row.rank, row.pinned) == (2, 7) and row.rss > 0 for row in rows)
    assert [row.time_s for row in rows] == sorted(row.time_s for row in rows)
    with stages.stage("after"):  # nobody listens any more
        pass
    assert read_rows(path) == rows


def test_samples_come_by_themselves_and_name_the_stage(tmp_path):
    engine, path = Counted(), tmp_path / "a.csv"
    stages = StageLog(engine)
    with MemoryLog(path, stages, engine, every_s=0.01), stages.stage("encode_text"):
        until = time.monotonic() + 10
        while sum(row.event == "sample" and row.stage == "encode_text" for row in read_rows(path)) < 3:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_the_log_of_a_run_that_fails_stays_and_the_error_is_its_own(tmp_path):
    engine, path = Counted(), tmp_path / "a.csv"
    stages = StageLog(engine)
    with pytest.raises(InputError, match="no face"), MemoryLog(path, stages, engine), stages.stage("encode_image"):
        raise InputError("no face")
    assert [row.event for row in read_rows(path) if row.stage] == ["begin", "end"]


def test_a_place_that_cannot_be_written_is_said_at_once(tmp_path):
    engine = Counted()
    with pytest.raises(OutputError, match=r"--memory-log .* cannot be written"):
        MemoryLog(tmp_path / "none" / "a.csv", StageLog(engine), engine).__enter__()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_costs_the_log_and_not_the_video(tmp_path):
    engine, ran = Counted(), []
    stages = StageLog(engine)
    path = tmp_path / "a.csv"
    path.symlink_to("/dev/full")

    def made() -> None:
        with MemoryLog(path, stages, engine, every_s=60):
            for _ in range(3):
                with stages.stage("denoise"):
                    ran.append(1)

    with pytest.raises(OutputError, match="could not be written to its end"):
        made()
    assert len(ran) == 3


@pytest.mark.parametrize(
    ("name", "rank", "expected"),
    [("log.csv", 1, "log.rank1.csv"), ("log", 2, "log.rank2"), ("a.b.csv", 10, "a.b.rank10.csv")],
)
def test_ranks_write_beside_each_other(tmp_path, name, rank, expected):
    assert path_of_rank(tmp_path / name, rank) == tmp_path / expected


def highest(rows: list[Row], stage: str) -> int:
    return max(row.rss for row in rows if (row.stage, row.event) == (stage, "end"))


def test_rows_agree_with_the_report(tiny, tmp_path):
    log = tmp_path / "log.csv"
    pipeline = AvatarPipeline.from_artifact(tiny.artifact("int8"), device="cpu")
    outputs = Outputs(video=tmp_path / "a.mp4", report=tmp_path / "a.json", memory_log=log)
    infer(pipeline, tiny.request(num_clip=2), outputs, quiet=True)
    report, rows = json.loads((tmp_path / "a.json").read_text()), read_rows(log)
    assert report["memory_log"] == str(log)
    calls = {stage["name"]: stage["calls"] for stage in report["stages"]}
    assert {"encode_text", "load_dit", "denoise", "decode", "write_video"} <= set(calls)
    for stage in report["stages"]:
        ends = [row for row in rows if (row.stage, row.event) == (stage["name"], "end")]
        assert len(ends) == stage["calls"]
        assert highest(rows, stage["name"]) == pytest.approx(stage["peak_rss_bytes"], rel=0.01)
    blocks = [row.block for row in rows if row.stage == "decode" and row.event == "end"]
    assert sorted(set(blocks) - {None}) == [block["block"] for block in report["blocks"]]
    assert all(row.allocated is row.reserved is row.free is None for row in rows)  # nobody counts on a CPU


def test_a_log_needs_a_place_of_its_own(tmp_path):
    same = tmp_path / "a.json"
    with pytest.raises(InputError, match="--memory-log and --report are both"):
        Outputs(video=tmp_path / "a.mp4", report=same, memory_log=same).check()
    (tmp_path / "log.csv").write_text("")
    with pytest.raises(InputError, match="there already"):
        Outputs(video=tmp_path / "a.mp4", memory_log=tmp_path / "log.csv").check()


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_rank_replaces_a_log_unasked(tmp_path, overwrite):
    engine, there = Counted(), tmp_path / "log.rank3.csv"
    there.write_text("of before")
    pipeline = SimpleNamespace(
        team=SimpleNamespace(role=SimpleNamespace(media=False, rank=3)),
        runtime=SimpleNamespace(stages=StageLog(engine), engine=engine),
    )
    outputs = Outputs(video=tmp_path / "a.mp4", memory_log=tmp_path / "log.csv", overwrite=overwrite)
    if not overwrite:
        with pytest.raises(InputError, match=r"--memory-log of this rank is .*log\.rank3\.csv, which is there already"):
            _memory_log(pipeline, outputs)
        assert there.read_text() == "of before"
        return
    with _memory_log(pipeline, outputs):
        pass
    assert {row.rank for row in read_rows(there)} == {3}


KILLED = """
import sys, time, torch
from pathlib import Path
from lowvram.memory_log.writer import MemoryLog
from lowvram.offload.copy_engine import Engine
from lowvram.runtime import StageLog
engine = Engine(torch.device("cpu")); stages = StageLog(engine)
with MemoryLog(Path(sys.argv[1]), stages, engine, every_s=0.05), stages.stage("denoise"):
    print("here", flush=True); time.sleep(60)
"""


def test_what_was_written_before_a_kill_can_be_read(tmp_path):
    path = tmp_path / "a.csv"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
    rows = read_rows(path)
    assert [row.event for row in rows[:2]] == ["sample", "begin"]
    assert len(rows) > 3
