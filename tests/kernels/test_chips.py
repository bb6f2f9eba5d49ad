from __future__ import annotations

import ast
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowvram_kernels import chips
from lowvram_kernels.errors import ConfigError
from lowvram_kernels.linear import linear_w8a8
from lowvram_kernels.rows import quantize_rows
from lowvram_kernels.trace import trace_kernels

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
    for cached in (chips._capability, chips._say_once, chips.has_triton, chips.missing_to_build):
        cached.cache_clear()


def pretend(monkeypatch, capability, triton=True):
    chips._capability.cache_clear()
    monkeypatch.delenv("LOWVRAM_TRITON", raising=False)
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


def nothing_to_build_with(monkeypatch, tmp_path, *, compiler: bool) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(chips.shutil, "which", lambda name: "/usr/bin/gcc" if compiler else None)
    monkeypatch.setattr(chips.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    chips.missing_to_build.cache_clear()


@pytest.mark.skipif(sys.platform == "win32", reason="Triton brings a compiler on Windows")
@pytest.mark.parametrize(("compiler", "word"), [(False, "a C compiler"), (True, "Python.h")])
def test_without_what_triton_builds_with_other_kernels_run_and_it_is_said(
    monkeypatch, caplog, tmp_path, compiler, word
):
    pretend(monkeypatch, (8, 9))
    nothing_to_build_with(monkeypatch, tmp_path, compiler=compiler)
    with caplog.at_level(logging.WARNING):
        assert not chips.triton_serves(CUDA)
        assert not chips.triton_serves(CUDA)
    (said,) = [record.getMessage() for record in caplog.records]
    assert word in said
    assert "python3-dev" in said


@pytest.mark.skipif(sys.platform == "win32", reason="Triton brings a compiler on Windows")
def test_a_compiler_may_be_named(monkeypatch, tmp_path):
    pretend(monkeypatch, (8, 9))
    nothing_to_build_with(monkeypatch, tmp_path, compiler=False)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CC", "my-cc")
    assert chips.triton_serves(CUDA)


def test_triton_can_be_switched_off(monkeypatch, caplog):
    pretend(monkeypatch, (8, 9))
    for value, serves in (("1", True), ("", True), ("0", False), ("0", False)):
        monkeypatch.setenv("LOWVRAM_TRITON", value)
        with caplog.at_level(logging.WARNING):
            assert chips.triton_serves(CUDA) is serves
    assert ["LOWVRAM_TRITON=0" in record.getMessage() for record in caplog.records] == [True]
    assert chips.has_fp8_units(CUDA)


@pytest.mark.parametrize("device", [CUDA, torch.device("cpu")])
def test_another_value_of_the_switch_is_refused(monkeypatch, device):
    pretend(monkeypatch, (8, 9))
    monkeypatch.setenv("LOWVRAM_TRITON", "off")
    with pytest.raises(ConfigError, match=r"LOWVRAM_TRITON is 'off'; expected 0 .* or 1"):
        chips.triton_serves(device)


def functions_that_import_triton() -> dict[str, set[str]]:
    """Functions of the dispatchers that import a Triton kernel, with the names that each calls."""
    folder = Path(chips.__file__).parent
    found = {}
    for path in folder.glob("[!t]*.py"):
        for function in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)):
            inside = list(ast.walk(function))
            modules = [node.module or "" for node in inside if isinstance(node, ast.ImportFrom)]
            if any(module.startswith("lowvram_kernels.triton_") for module in modules):
                calls = (node.func for node in inside if isinstance(node, ast.Call))
                found[f"{path.stem}.{function.name}"] = {call.id for call in calls if isinstance(call, ast.Name)}
    return found


def test_every_dispatcher_asks_before_it_takes_a_triton_kernel():
    found = functions_that_import_triton()
    assert {"rows.quantize_rows", "norm.norm_rows", "linear._product", "ring_attention.ring_attention"} <= set(found)
    assert [name for name, calls in found.items() if not calls & {"choose", "_takes_triton"}] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_switched_off_the_torch_kernels_run_and_are_named(monkeypatch):
    monkeypatch.setenv("LOWVRAM_TRITON", "0")
    x = torch.randn(8, 32, device="cuda")
    with trace_kernels() as counts:
        q, scale = quantize_rows(x, torch.int8, group=16)
        linear_w8a8(x, q, scale[:, 0].contiguous(), None, group=16)
    assert {name for _, name in counts} == {"int8 rotated by 16: torch", "int8: torch._int_mm"}
