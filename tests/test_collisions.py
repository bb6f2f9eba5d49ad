"""Meetings of two runs in one place that ``benchmarks/collisions.py`` makes by the score: one of each kind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def collisions(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    import collisions

    return collisions


@pytest.mark.slow
def test_nothing_wrong_is_left_behind(collisions, tmp_path):
    rows = collisions.meetings(tmp_path, 1, 0)
    assert [row["kind"] for row in rows] == list(collisions.KINDS)
    assert [row["wrong"] for row in rows] == [[]] * len(rows), rows


def run(exit_code: int, said: str = "") -> dict:
    return {"exit_code": exit_code, "said": said}


REFUSED = run(2, "lowvram: error: video.mp4 is being written by process 7 on here (lowvram infer, since 2026)")


@pytest.mark.parametrize(
    ("kind", "runs", "found", "words"),
    [
        ("two infers", [run(0), REFUSED], {"video": "int8 7"}, []),
        ("two infers", [run(0), run(0)], {"video": "int8 420"}, []),
        ("two infers", [run(0), REFUSED], {"video": "int8 420"}, ["the video is of int8 420, not {'int8 7'}"]),
        ("two infers", [run(0), REFUSED], {"video": None}, ["the video is of None, not {'int8 7'}"]),
        ("two converts", [run(2), run(0)], {"artifact": "fp8"}, ["a run was refused without a word: ''"]),
        ("two converts", [run(1, "x"), run(0)], {"artifact": "int8"}, [
            "the artifact is of int8, not {'fp8'}", "a run was refused without a word: 'x'",
        ]),
        ("infer beside convert", [run(0), run(0)], {"artifact": "fp8", "video": "fp8 7"}, []),
        ("infer beside convert", [run(0), run(0)], {"artifact": "something else", "video": "int8 7"}, [
            "the artifact is of something else, not {'fp8'}",
        ]),
        ("two equal converts", [REFUSED, REFUSED], {"artifact": None}, ["no run succeeded"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_seen(collisions, kind, runs, found, words):
    assert collisions.wrong(kind, runs, found) == words
