"""Two of the faults that ``benchmarks/faults.py`` makes by the score: real processes, killed while they make blocks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def faults(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    import faults

    return faults


@pytest.mark.parametrize(("layout", "victim"), [("2 stages", 0), ("2 Ulysses ranks", 0)], ids=["another", "the-writer"])
def test_a_killed_rank_ends_the_run(faults, tmp_path, layout, victim):
    fault = faults.Fault(layout=layout, victim=victim, signal="SIGKILL", running=True, after_s=0.5)
    found = faults.one(fault, faults.write_model(tmp_path), tmp_path)
    assert found["wrong"] == [], found
    assert found["frames_after"] > 0
    assert found["seconds"] < 30


def test_what_is_wrong_is_seen(faults):
    fault = faults.Fault(layout="3 stages and the VAE", victim=1, signal="SIGKILL", running=True, after_s=0.0)
    doing = {0: "denoising block 6", 1: "waiting", 2: "denoising block 5", 3: "decoding block 4"}
    found = {"exit_code": 1, "seconds": 3.0, "processes_left": 0, "doing": doing, "frames_before": 33}
    found |= {"frames_after": 45, "said": "lowvram: error: rank 1 (stage 1) on here died; last it was waiting"}
    assert faults.wrong(fault, found) == []
    bad = {"exit_code": 0, "seconds": 31.0, "processes_left": 2, "frames_after": 44, "said": "rank 11 is gone"}
    assert faults.wrong(fault, found | bad) == [
        "took 31.0 s, more than 30", "ended with exit code 0", "2 processes are left", "rank 1 is not named",
        "no last words", "44 frames play, 45 were written",
    ]  # fmt: skip
    assert faults.wrong(fault, found | {"exit_code": None}) == ["ended with exit code None"]


def test_every_layout_signal_and_moment_is_drawn(faults):
    drawn = list(faults.drawn_faults(20, 0))
    assert {fault.layout for fault in drawn} == set(faults.DRAWN)
    assert [fault.signal for fault in drawn].count("SIGSTOP") == 4
    assert [fault.running for fault in drawn].count(False) == 5
    assert all(fault.victim < faults.ranks_of(fault.layout) for fault in drawn)
    assert drawn == list(faults.drawn_faults(20, 0))
    assert drawn != list(faults.drawn_faults(20, 1))
