"""The measure of quality on the trained tiny face, at its smallest."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    import quality

    return quality


@pytest.mark.slow
def test_each_artifact_is_scored_freely_and_teacher_forced(quality, tmp_path):
    result = quality.measure(tmp_path, ("int8-dit",), people=1, seconds=0.8)
    json.dumps(result, allow_nan=False)
    (row,) = result["variants"]
    assert row["title"] == "DiT int8, others bf16"
    forced, free = row["teacher_forced"], row["free"]
    assert 0.002 < forced["velocity_error"]["mean"] < 0.05
    assert len(forced["by_step"]) == 4
    assert 0.002 < free["latent_error"]["mean"] < 0.1
    assert 35 < free["psnr"]["mean"] < 70
    assert 0.97 < free["ssim"]["mean"] < 1
    assert row["face"]["background_psnr"]["each"][0] > 25
    table = quality.markdown(result).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert table[-1].startswith("| DiT int8, others bf16 | ")
    assert f"{free['psnr']['mean']:.1f} ± 0.0 dB" in table[-1]


def test_people_are_told_by_mean_and_spread(quality):
    each = [{"teacher_forced": {"error": value, "by_step": [value, 2 * value]}} for value in (1.0, 2.0, 6.0)]
    found = quality.summary(each)["teacher_forced"]
    assert found["error"] == {"mean": 3.0, "deviation": pytest.approx(7**0.5), "each": [1.0, 2.0, 6.0]}
    assert [step["mean"] for step in found["by_step"]] == [3.0, 6.0]
    assert quality.percent(found["error"]) == "300.00% ± 264.58"


@pytest.mark.parametrize("text", ["", "int4", "int8,", "int8,bf16", "INT8"])
def test_a_variant_that_is_not_known(quality, text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected some of int8, "):
        quality.names(text)


def test_known_variants(quality):
    assert quality.names("int8,int8-nf4-text") == ("int8", "int8-nf4-text")
