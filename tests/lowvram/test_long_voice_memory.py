"""One clip of an hour of voice takes the memory and the time that one of ten seconds takes: processes of their own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "long_voice.py"
NOISE_S = 1.0


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("long_voice_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_an_hour_is_as_cheap_as_ten_seconds(benchmark, tmp_path):
    benchmark.prepare(tmp_path)
    short, hour = (benchmark.one_run(tmp_path, seconds) for seconds in (10, 3600))
    assert short["frames"] == hour["frames"] == 45
    assert hour["peak_rss_bytes"] < 1.05 * short["peak_rss_bytes"]
    assert hour["first_frames_s"] < 1.2 * short["first_frames_s"] + NOISE_S
