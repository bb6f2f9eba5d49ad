"""Runs ``on_device/check_*.py`` in a process of its own: in Triton's interpreter here, on the card with ``-m gpu``.

Triton decides at its import whether it interprets, so that this process could have only one of both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "on_device"
CHECKS = sorted(path.name for path in FOLDER.glob("check_*.py"))
pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be checked")


def run_checks(name: str, **environment: str) -> str:
    """Run one file of checks; return pytest's last line."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    result = subprocess.run(
        [*command, str(FOLDER / name)],
        env=clean | {"PYTHONPATH": str(FOLDER)} | environment,
        cwd=FOLDER.parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    return result.stdout.splitlines()[-1] if result.stdout else ""


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(name):
    run_checks(name, LOWVRAM_CHECK_DEVICE="cpu", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_card(name):
    run_checks(name, LOWVRAM_CHECK_DEVICE="cuda")
