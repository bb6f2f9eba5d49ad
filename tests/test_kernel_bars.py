"""Bars of the kernels' benchmark, and its row of the VAE, on a machine without a GPU."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])


def result(gpu: str, linear: list[float], attention: float, vae: float) -> dict:
    return {
        "gpu": gpu,
        "linear": [{"speedup": {"int8": 9.0, "int8 rotated": speedup}} for speedup in linear],
        "attention": {"speedup": attention},
        "vae": {"speedup": vae},
    }


def test_a_library_that_looks_for_a_module_called_kernels_may_find_this_one():
    """transformers does; scripts of this folder have it on their path, and it must not ask for transformers again."""
    said = "import sys, kernels; print(*sorted({'transformers', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", said], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("given", "expected", "met"),
    [
        (("NVIDIA GeForce RTX 4090", [1.9, 1.6], 1.4, 2.5), [1.5, 1.3, 2.0], [True, True, True]),
        (("NVIDIA GeForce RTX 3090", [1.9, 1.4], 1.2, 1.9), [1.5, 1.3, 2.0], [False, False, False]),
        (("NVIDIA H100 80GB HBM3", [1.5], 1.0, 2.0), [1.5, 1.0, 2.0], [True, True, True]),
        (("NVIDIA H200", [0.9, 3.0], 0.99, 2.1), [1.5, 1.0, 2.0], [False, False, True]),
        (("NVIDIA A100-SXM4-80GB", [1.6], float("nan"), 2.0), [1.5, 1.0, 2.0], [True, False, True]),
    ],
)
def test_a_bar_is_met_by_the_poorest_row(here, given, expected, met):
    from kernel_bars import bars_of

    rows = bars_of(result(*given))
    assert [row["expected"] for row in rows] == expected
    assert [row["met"] for row in rows] == met
    assert rows[0]["found"] == min(given[1])


def test_the_vae_as_it_runs_here_gives_the_librarys_frames(here):
    from kernel_vae import vae_row

    called = []

    def watch(call) -> float:
        begin = time.perf_counter()
        for _ in range(2):
            called.append(call().shape)
        return (time.perf_counter() - begin) * 500

    row = vae_row(watch, (8, 12), torch.float32, torch.device("cpu"), base_dim=4)
    assert row["error"] < 1e-5
    assert row["speedup"] > 0
    assert set(called) == {(3, 4, 64, 96)}
