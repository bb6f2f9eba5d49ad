from __future__ import annotations

import pytest

from lowvram.doctor.probes import Driver, Torch
from lowvram.doctor.software import (
    check_allocator,
    check_compiler,
    check_driver,
    check_encoders,
    check_python,
    check_torch,
    check_triton,
    numbers,
)
from tests.lowvram.doctor.invented import CPU_TORCH, gpu, machine


@pytest.mark.parametrize(("version", "status"), [((3, 9, 18), "problem"), ((3, 10, 0), "ok"), ((3, 14, 1), "ok")])
def test_python(version, status):
    assert check_python(machine(python=version)).status == status


@pytest.mark.parametrize(
    ("torch", "driver", "status"),
    [
        (CPU_TORCH, None, "ok"),
        (CPU_TORCH, Driver(cuda=(12, 8)), "problem"),
        (Torch(version="2.10.0", cuda="12.8"), Driver(cuda=(12, 8)), "ok"),
        (Torch(version="2.9.1+cu128", cuda="12.8"), Driver(cuda=(12, 8)), "problem"),
        (Torch(version="2.13.0", cuda="13.0"), None, "ok"),
    ],
)
def test_torch(torch, driver, status):
    assert check_torch(machine(torch=torch, driver=driver)).status == status


@pytest.mark.parametrize(
    ("driver", "status"),
    [
        (None, "warning"),
        (Driver(cuda=(12, 8), version="570.1"), "problem"),
        (Driver(cuda=(13, 0)), "warning"),
        (Driver(cuda=(13, 2)), "ok"),
        (Driver(cuda=(14, 0)), "ok"),
    ],
)
def test_the_driver_has_to_serve_the_cuda_of_torch(driver, status):
    found = check_driver(machine(torch=Torch(version="2.13.0", cuda="13.2"), driver=driver))
    assert found.status == status
    assert status != "problem" or "CUDA 13.2" in found.expected


def test_a_torch_without_cuda_asks_nothing_of_the_driver():
    assert check_driver(machine(torch=CPU_TORCH, driver=Driver(cuda=(11, 0)))).status == "ok"


@pytest.mark.parametrize(
    ("version", "on_gpu", "status"),
    [
        (None, True, "warning"),
        (None, False, "ok"),
        ("3.3.1", True, "warning"),
        ("3.3.1", False, "ok"),
        ("3.4", True, "ok"),
    ],
)
def test_triton(version, on_gpu, status):
    assert check_triton(machine(triton=version), on_gpu=on_gpu).status == status


@pytest.mark.parametrize(("value", "status"), [("0", "warning"), ("1", "ok"), ("", "ok")])
def test_triton_that_is_switched_off(value, status):
    finding = check_triton(machine(triton="3.6", environ={"LOWVRAM_TRITON": value}), on_gpu=True)
    assert finding.status == status
    assert (status == "ok") == ("LOWVRAM_TRITON" not in finding.text())


def test_no_libx264():
    found = check_encoders(machine(encoders=frozenset({"aac"})))
    assert found.status == "problem"
    assert "libx264" in found.found
    assert "aac" not in found.found
    assert "av" in found.advice
    assert check_encoders(machine()).status == "ok"


@pytest.mark.parametrize(
    ("environ", "advice"),
    [
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, None),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:128,expandable_segments: True"}, None),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, "max_split_size_mb:128,expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "PYTORCH_ALLOC_CONF=expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": ""}, "PYTORCH_ALLOC_CONF=expandable_segments:True"),
        (
            {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
            "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64,expandable_segments:True, or unset PYTORCH_CUDA_ALLOC_CONF",
        ),
    ],
)
def test_the_allocator(environ, advice):
    found = check_allocator(machine(gpu(), environ=environ), on_gpu=True)
    assert found.status == ("warning" if advice else "ok")
    assert found.advice.endswith(advice or "")
    assert check_allocator(machine(environ=environ), on_gpu=False).status == "ok"


def test_versions():
    assert numbers("2.13.0+cpu") == (2, 13)
    with pytest.raises(ValueError, match="nightly"):
        numbers("nightly")


@pytest.mark.parametrize(
    ("answers", "on_gpu", "status"),
    [
        ({"compiler": ""}, True, "ok"),
        ({"compiler": "missing: a C compiler"}, True, "warning"),
        ({"compiler": "missing: a C compiler"}, False, "ok"),
        ({"compiler": "missing: a C compiler", "triton": None}, True, "ok"),
        ({"compiler": "gcc failed", "environ": {"LOWVRAM_TRITON": "0"}}, True, "ok"),
    ],
)
def test_compiler(answers, on_gpu, status):
    found = check_compiler(machine(gpu(), **answers), on_gpu=on_gpu)
    assert found.status == status
    if status == "warning":
        assert "a C compiler" in found.found
        assert "gcc and python3-dev" in found.advice
