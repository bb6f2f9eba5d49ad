"""The real questions, as far as any machine can answer them."""

from __future__ import annotations

import json
import os
import socket

import pytest
import torch
from click.testing import CliRunner

from lowvram.cli import main
from lowvram.doctor import machine
from lowvram.doctor.machine import bind, free_port, pcie_rates, this_machine
from lowvram.doctor.probes import Pinned
from lowvram.offload import pinning
from lowvram.planning.measure import COPY_BYTES
from tests.lowvram.fake_pinning import LimitedDriver

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_every_question_that_needs_no_card_is_answered(tmp_path):
    probes = this_machine()
    assert probes.python() >= (3, 10, 0)
    assert probes.torch().version == torch.__version__
    available, total = probes.ram()
    assert 0 < available <= total
    assert probes.disk_free(tmp_path) > 0
    assert {"libx264", "aac"} == probes.encoders()
    assert probes.gloo()
    assert probes.cores() >= 1
    assert probes.names().host == socket.gethostname()
    assert probes.environ() is os.environ
    limit, free = probes.memlock(), probes.shared_memory()
    assert limit is None or limit >= 0
    assert free is None or free >= 0
    assert probes.kernel()
    assert bool(probes.gpus()) == torch.cuda.is_available()


def test_a_port_that_somebody_listens_at():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert bind(taken.getsockname()[1]) == "taken by another program"
    assert bind(free_port()) == ""


def test_a_driver_that_is_not_here(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(pinning.ctypes, "CDLL", missing)
    assert this_machine().driver() is None


def test_a_driver_says_what_it_serves(monkeypatch, tmp_path):
    class Library:
        def cuDriverGetVersion(self, number):
            number._obj.value = 12080
            return 0

    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb\nGCC version: gcc 12\n")
    monkeypatch.setattr(pinning.ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(machine, "_DRIVER_FILE", file)
    found = this_machine().driver()
    assert (found.cuda, found.version) == ((12, 8), "570.124.06")
    monkeypatch.setattr(machine, "_DRIVER_FILE", tmp_path / "none")
    assert this_machine().driver().version == ""


def test_a_compiler_is_tried_and_not_only_found(monkeypatch, tmp_path):
    if machine.chips.missing_to_build():
        pytest.skip("no compiler here")
    monkeypatch.delenv("CC", raising=False)
    assert this_machine().compiler() == ""
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such target >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert this_machine().compiler() == f"{broken} failed: no such target"
    monkeypatch.setenv("CC", str(tmp_path / "gone"))
    assert "cannot be run" in this_machine().compiler()


def test_as_much_is_pinned_as_the_driver_lets(monkeypatch):
    driver = LimitedDriver(200)
    registry = pinning.Registry(driver)
    monkeypatch.setattr(machine, "registry", lambda: registry)
    monkeypatch.setattr(machine, "PIN_PIECE_BYTES", 64)
    assert this_machine().pin(150) == Pinned(nbytes=150, status=0)
    assert this_machine().pin(300) == Pinned(nbytes=192, status=2)
    assert driver.most == 192
    assert driver.live == {}


class Runner:
    def __init__(self):
        self.calls = []

    def seconds(self, what):
        self.calls.append(what)
        cold = self.calls.count(what) == 1
        return {"h2d": 0.01, "d2h": 0.02}[what] * (0.1 if cold else 1 + self.calls.count(what) % 3)


def test_pcie_is_the_best_of_the_warm_copies():
    runner = Runner()
    assert pcie_rates(runner) == pytest.approx((COPY_BYTES / 0.01, COPY_BYTES / 0.02))
    assert set(runner.calls) == {"h2d", "d2h"}


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["doctor", "--json", "--no-measure", "--gpus", "2", "--port", port])
    found = json.loads(result.stdout)
    by_name = {finding["check"]: finding for finding in found["findings"]}
    assert result.exit_code == 1
    assert not found["healthy"]
    assert by_name["port"]["status"] == "problem"
    assert f"disk {tmp_path}" in by_name
    assert not list(tmp_path.iterdir())


def test_the_command_for_people():
    result = CliRunner().invoke(main, ["doctor", "--no-measure", "--gpus", "1"])
    lines = result.stdout.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warning", "problem"}
    assert result.exit_code == any(line.startswith("problem") for line in lines)
    assert sum("ffmpeg: libx264 and aac" in line for line in lines) == 1


def test_a_model_that_is_not_there_is_an_input_error(tmp_path):
    result = CliRunner().invoke(main, ["doctor", "--model", str(tmp_path / "gone")])
    assert result.exit_code == 2
    assert "lowvram: error:" in result.stderr


@pytest.mark.gpu
@NEEDS_GPU
def test_a_real_card():
    probes = this_machine()
    card = probes.gpus()[0]
    assert 0 < card.free_bytes <= card.total_bytes
    assert card.generation >= 50
    assert probes.driver().cuda >= (11, 0)
    assert all(1e9 < rate < 1e12 for rate in probes.pcie(0))
    assert probes.pin(1 << 20).nbytes in (0, 1 << 20)
    assert set(probes.card_states()) <= {c.index for c in probes.gpus()}
