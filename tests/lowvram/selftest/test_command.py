"""``lowvram selftest`` as a person meets it, and a run that goes by what it found."""

from __future__ import annotations

import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

import lowvram.selftest.examine as examining
from lowvram.cli import main
from lowvram.infer import Outputs, infer
from lowvram.pipeline import AvatarPipeline
from lowvram.selftest.checks import kernel_check
from lowvram.selftest.examine import examine
from lowvram.selftest.report import Examined, bug_report, print_examined, without_user
from lowvram.selftest.results import Result, Subject, judge
from lowvram.selftest.trials import SMALL
from lowvram_kernels.choices import FLOAT32, INT_MM
from tests.lowvram.selftest import fakes
from tests.lowvram.selftest.test_first_run import IDENTITY, RESULTS

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_machine_without_a_gpu_says_so_and_examines_its_processor(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    report = tmp_path / "report.txt"
    done = subprocess.run(
        [sys.executable, "-m", "lowvram", "selftest", "--json", "--report", report],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert "no CUDA device is here" in told["note"]
    (processor,) = told["devices"]
    status = {check["subject"]["name"]: check["status"] for check in processor["checks"]}
    assert set(status.values()) == {"passed"}
    assert {"linear_w8a8 int8: torch float32, small", "ring_attention: torch, small", "copies without pinning"} <= set(
        status
    )
    assert "tiny model: on the device, and streamed from the host" in status
    text = report.read_text()
    assert "no CUDA device is here" in text
    assert f"{len(status)} of {len(status)} checks passed" in text
    (known,) = json.loads((tmp_path / "cache" / "lowvram" / "selftest.json").read_text()).values()
    assert known["complete"]


@pytest.mark.parametrize(("fault", "code"), [("right", 0), ("wrong", 0), ("nan", 0), ("compile_error", 0)])
def test_a_kernel_that_is_gone_around_is_no_failure(fault, code, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(examining, "SOURCES", (f"tests.lowvram.selftest.fakes:fault_{fault}",))
    done = CliRunner().invoke(main, ["selftest", "--device", "cpu"])
    assert done.exit_code == code, done.output
    assert ("off: linear_w8a8 int8: triton is switched off" in done.stdout) == (fault != "right")


def test_what_nothing_makes_good_ends_with_1(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(examining, "SOURCES", ("tests.lowvram.selftest.fakes:two",))
    done = CliRunner().invoke(main, ["selftest", "--device", "cpu"])
    assert done.exit_code == 1
    assert "no way around: first" in done.stdout


def test_a_process_that_does_not_begin_is_a_failure_and_examined_again():
    results, complete = examine(CPU, sources=["tests.lowvram.selftest.fakes:unbegun"])
    assert [result.status for result in results] == ["failed"]
    assert "no kernel image" in results[0].message
    assert not complete
    again, complete = examine(CPU, known=results, sources=[])
    assert (again, complete) == ([], True)


@pytest.mark.parametrize("fault", ["compile error", "wrong", "nan"])
def test_a_run_goes_on_without_the_kernel_and_says_so(tiny, tmp_path, fault, caplog):
    """On a processor ``torch._int_mm`` stands for a card's kernel."""

    def faulty(sizes, device):
        trial = fakes.trials.linear(sizes, device, torch.int8, gelu=False)
        backends = dict(trial.backends)
        right = backends[FLOAT32]  # without VNNI the other one may be wrong by itself
        return type(trial)(backends=backends | {INT_MM: lambda: fakes.CHANGES[fault](right())}, judge=trial.judge)

    checks = [kernel_check(fakes.OPERATION, backend, SMALL, CPU, faulty) for backend in (INT_MM, FLOAT32)]
    verdict = judge([fakes.outcome(check) for check in checks])
    verdict.apply(CPU)
    assert f"{fakes.OPERATION}: torch._int_mm is switched off" in caplog.text
    pipeline = AvatarPipeline.from_artifact(tiny.artifact("int8"), device="cpu")
    report = infer(pipeline, tiny.request(num_clip=1), Outputs(video=tmp_path / "a.mp4"), quiet=True)
    notes = [note for note in report["kernel_choices"] if note["operation"] == fakes.OPERATION]
    (note,) = [note for note in notes if note["verdict"] == "off"]
    assert note["backend"] == INT_MM
    assert "report it with the text of `lowvram selftest" in note["reason"]
    calls = {kernel["kernel"]: kernel["calls"] for kernel in report["kernels"] if kernel["operation"] == "linear_w8a8"}
    assert calls["int8: torch float32"] > 0
    assert report["frames_written"] > 0


def examined() -> Examined:
    skipped = Result(subject=Subject(name="copies with pinning"), status="skipped", message="no room")
    rates = Result(subject=Subject(name="copies"), status="passed", figures={"in_bytes_per_s": 2.5e10})
    return Examined(device=torch.device("cuda", 0), identity=IDENTITY, results=[*RESULTS, skipped, rates])


def test_a_table_has_every_check_and_what_follows():
    out = io.StringIO()
    print_examined(examined(), Console(file=out, width=120))
    for said in ("norm_rope: triton, 14B", "failed", "values hold NaN", "no room", "2.5e+10", "torch runs instead"):
        assert said in out.getvalue(), said
    assert "2 of 4 checks passed" in out.getvalue()


def test_a_report_names_versions_and_failures_and_no_user(monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "someone")
    text = bug_report([examined()])
    assert "device Card | capability 8.9 | driver 580 | torch 2.13 | triton 3.7.1" in text
    assert "failed: norm_rope: triton, 14B: values hold NaN" in text
    assert without_user(f"{Path.home()}/x and {Path.cwd()}/y and /mnt/someone/z") == "~/x and ./y and /mnt/user/z"


def test_a_report_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(examining, "selftest", functools.partial(lambda device: ([], "")))
    done = CliRunner().invoke(main, ["selftest", "--report", str(tmp_path / "none" / "report.txt")])
    assert done.exit_code == 2
    assert "cannot be written" in done.stderr
