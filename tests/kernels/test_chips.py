from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from lowvram_kernels import chips

CUDA = torch.device("cuda", 0)

WITHOUT_TRITON = """
import sys, pkgutil, importlib
sys.modules["triton"] = None
import torch, lowvram_kernels
names = [m.name for m in pkgutil.iter_modules(lowvram_kernels.__path__) if not m.name.startswith("triton_")]
for name in names: importlib.import_module("lowvram_kernels." + name)
assert {"linear", "ring_attention", "norm", "rope"} <= set(names)
from lowvram_kernels.linear import linear_w8a8
from lowvram_kernels.rows import quantize_rows
q, s = quantize_rows(torch.randn(8, 16), torch.int8)
assert linear_w8a8(torch.randn(3, 16), q, s[:, 0], None).isfinite().all()
"""


@pytest.fixture(autouse=True)
def _forget():
    yield
    for cached in (chips._capability, chips._say_once, chips.has_triton):
        cached.cache_clear()


def pretend(monkeypatch, capability, triton=True):
    chips._capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    monkeypatch.setattr(chips, "has_triton", lambda: triton)
    monkeypatch.setattr(chips.has_triton, "cache_clear", lambda: None, raising=False)


def test_without_triton_everything_else_imports_and_runs():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)


@pytest.mark.parametrize(
    ("capability", "known", "fp8"),
    [
        ((8, 0), 80, False),
        ((8, 6), 86, False),
        ((8, 7), 86, False),
        ((8, 9), 89, True),
        ((9, 0), 90, True),
        ((10, 0), 86, True),
        ((12, 0), 120, True),
    ],
)
def test_generations(monkeypatch, capability, known, fp8):
    pretend(monkeypatch, capability)
    assert chips.known_generation(CUDA) == known
    assert chips.has_fp8_units(CUDA) is fp8
    assert chips.triton_serves(CUDA)


def test_the_cpu_has_no_triton_and_says_nothing(caplog):
    assert chips.generation(torch.device("cpu")) == 0
    assert not chips.triton_serves(torch.device("cpu"))
    assert chips.has_fp8_units(torch.device("cpu"))
    assert not caplog.records


@pytest.mark.parametrize(("capability", "triton", "word"), [((8, 6), False, "triton"), ((7, 5), True, "sm_80")])
def test_a_card_without_triton_is_reported_once(monkeypatch, caplog, capability, triton, word):
    pretend(monkeypatch, capability, triton)
    with caplog.at_level(logging.WARNING):
        assert not chips.triton_serves(CUDA)
        assert not chips.triton_serves(CUDA)
    assert [word in record.getMessage() for record in caplog.records] == [True]
