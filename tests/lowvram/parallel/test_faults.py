"""Two of the faults that ``benchmarks/faults.py`` makes by the score: real processes, killed while they make blocks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def faults():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
        import faults

        return faults


@pytest.fixture(scope="module")
def model(faults, tmp_path_factory):
    """Once for all runs, and with the narrowest VAE: what it draws is not looked at, that its frames play is."""
    return faults.write_model(tmp_path_factory.mktemp("model"), vae_base_dim=2)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "victim"), [("2 stages", 0), ("2 Ulysses ranks", 0)], ids=["another", "the-writer"])
def test_a_killed_rank_ends_the_run(faults, model, tmp_path, layout, victim):
    fault = faults.Fault(layout=layout, victim=victim, signal="SIGKILL", running=True, after_s=0.5)
    found = faults.one(fault, model, tmp_path)
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


def test_every_rank_is_killed_and_the_moments_are_drawn(faults):
    drawn = list(faults.drawn_faults(20, 3, 2, 0))
    kills, early, stops = drawn[:20], drawn[20:23], drawn[23:]
    assert all(fault.running and fault.signal == "SIGKILL" for fault in kills)
    ranks = {(layout, rank) for layout in faults.DRAWN for rank in range(faults.ranks_of(layout))}
    assert {(fault.layout, fault.victim) for fault in kills} == ranks
    assert [(fault.running, fault.signal) for fault in early] == [(False, "SIGKILL")] * 3
    assert [(fault.running, fault.signal) for fault in stops] == [(True, "SIGSTOP")] * 2
    assert len({fault.after_s for fault in drawn}) == 25
    assert drawn == list(faults.drawn_faults(20, 3, 2, 0))
    assert drawn != list(faults.drawn_faults(20, 3, 2, 1))
