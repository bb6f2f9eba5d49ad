"""One clip of an hour of voice takes the memory and the time that one of ten seconds takes: processes of their own."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "long_voice.py"
NOISE_S = 1.0


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("long_voice_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_an_hour_is_as_cheap_as_ten_seconds(benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other on a busy machine take time as well
    benchmark.prepare(tmp_path)
    short, hour = (benchmark.one_run(tmp_path, seconds) for seconds in (10, 3600))
    assert short["frames"] == hour["frames"] == 45
    assert hour["peak_rss_bytes"] < 1.05 * short["peak_rss_bytes"]
    # Processor time: what the clock says depends on what else the machine does meanwhile.
    assert hour["first_frames_cpu_s"] < 1.2 * short["first_frames_cpu_s"] + NOISE_S


def test_differences_are_of_every_frame(benchmark):
    whole = torch.ones(1, 2, 8, 3)
    mine = whole.clone()
    mine[..., 1] += 0.5
    found = benchmark.relative(mine, whole)
    assert found["frames"] == 3
    assert found["relative_by_frame"] == {"mean": pytest.approx(0.5 / 3), "largest": pytest.approx(0.5), "frame": 1}
    assert found["relative"] == pytest.approx(0.5 / 3**0.5)


def test_multiples_are_of_the_first_length(benchmark):
    runs = {"10 s": {"peak_rss_bytes": 4, "first_frames_s": 2.0}, "60 s": {"peak_rss_bytes": 5, "first_frames_s": 2.0}}
    assert benchmark.times_the_first(runs)["60 s"] == {"peak_rss_bytes": 1.25, "first_frames_s": 1.0}


@pytest.mark.parametrize("text", ["", "10,x", "2", "-5", "1.5"])
def test_lengths_that_are_none(benchmark, text):
    with pytest.raises(argparse.ArgumentTypeError):
        benchmark.lengths(text)
