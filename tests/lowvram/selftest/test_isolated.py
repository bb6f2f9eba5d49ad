"""A check that fails, lies, hangs or dies costs itself alone."""

from __future__ import annotations

import io
import json

import pytest
import torch

from lowvram.selftest import worker
from lowvram.selftest.isolated import run_isolated
from lowvram.selftest.results import judge
from lowvram.selftest.worker import work
from lowvram_kernels.errors import DeviceError
from tests.lowvram.selftest import fakes

CPU = torch.device("cpu")
FAKES = "tests.lowvram.selftest.fakes:"


def isolated(name: str, **options):
    heard = []
    results = run_isolated(FAKES + name, CPU, heard=heard.append, **options)
    assert heard == results
    return results


def lines_of(checks, skip=frozenset()) -> list[dict]:
    out = io.StringIO()
    work(checks, skip, CPU, out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.parametrize(("name", "said"), [("hang", "did not come to an end within 8 s"), ("death", "code 134")])
def test_a_check_that_ends_or_holds_its_process_costs_one_check(name, said):
    failed, *others = isolated(f"fault_{name}", check_s=8.0)
    assert (failed.status, failed.subject.backend) == ("failed", "triton")
    assert said in failed.message
    assert [result.status for result in others] == ["passed", "passed"]
    (off,) = judge([failed, *others]).off
    assert (off.operation, off.backend, off.instead) == (fakes.OPERATION, "triton", "torch float32")


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("compile error", "failed", "out_dtype expected"),
        ("launch error", "failed", "invalid device image"),
        ("wrong", "failed", "it computes wrongly"),
        ("nan", "failed", "1 of 2640 values that are NaN or infinite; the reference has none"),
        ("out of memory", "skipped", "out of memory"),
        ("right", "passed", ""),
    ],
)
def test_what_a_check_meets_is_its_result_alone(name, status, said):
    lines = lines_of(fakes.checks_of(name, CPU))
    results = [line["result"] for line in lines if "result" in line]
    assert [result["status"] for result in results] == [status, "passed", "passed"]
    assert said in results[0]["message"]
    assert lines[-1] == {"done": True}


def test_a_device_that_no_longer_answers_ends_the_process(monkeypatch):
    monkeypatch.setattr(worker, "usable", lambda device: False)
    first, *rest = lines_of(fakes.two(CPU))
    assert first == {"begin": {"name": "first", "operation": "", "backend": "", "size": ""}}
    assert [line["result"]["status"] for line in rest] == ["failed"]


def test_the_examination_goes_on_in_another_process(monkeypatch, tmp_path):
    # What a worker imports first makes its device unusable, as an illegal access does.
    (tmp_path / "lost.py").write_text(
        "from lowvram.selftest import worker\n"
        "from tests.lowvram.selftest.fakes import two\n"
        "worker_module = __import__('sys').modules['__main__']\n"
        "worker_module.usable = lambda device: False\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [result.status for result in run_isolated("lost:two", CPU)] == ["failed", "passed"]


def test_what_libraries_print_is_no_result():
    assert [result.status for result in isolated("chatty")] == ["passed"]


def test_what_is_known_is_not_run_again():
    assert isolated("chatty", known=["chatty"]) == []


def test_a_process_that_does_not_begin_is_an_error_with_its_last_words():
    with pytest.raises(DeviceError, match=r"before a check.*no kernel image is available"):
        isolated("unbegun")


def test_nothing_is_awaited_after_the_limit():
    assert isolated("fault_hang", until=0.0) == []
