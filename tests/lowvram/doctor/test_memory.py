from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lowvram.doctor.memory import LARGEST_TRY_BYTES, TRY_BYTES, check_disk, check_pinning, check_ram, check_wsl
from lowvram.doctor.probes import Pinned
from tests.lowvram.doctor.invented import GIB, MIB, WANTS, gpu, machine, wsl


@pytest.mark.parametrize(
    ("available", "total", "planned", "status"),
    [(22, 64, True, "ok"), (20, 64, True, "warning"), (20, 20, True, "problem"), (5, 8, False, "warning")],
)
def test_ram(available, total, planned, status):
    found = check_ram(machine(ram=(available * GIB, total * GIB)), WANTS, planned=planned)
    assert found.status == status
    assert "21.00 GiB" in found.text()


@pytest.mark.parametrize(
    ("pinned", "free", "tried"),
    [
        (None, 60 * GIB, TRY_BYTES),
        (0, 60 * GIB, TRY_BYTES),
        (GIB, 60 * GIB, GIB),
        (18 * GIB, 60 * GIB, LARGEST_TRY_BYTES),
        (18 * GIB, 2 * GIB, GIB // 2),
        (18 * GIB, 100 * MIB, TRY_BYTES),
    ],
)
def test_what_a_run_would_pin_is_tried_as_far_as_that_does_no_harm(pinned, free, tried):
    asked = []

    def pin(nbytes):
        asked.append(nbytes)
        return Pinned(nbytes=nbytes, status=0)

    wants = None if pinned is None else dataclasses.replace(WANTS, pinned_bytes=pinned)
    assert check_pinning(machine(gpu(), ram=(free, 64 * GIB), pin=pin), wants, on_gpu=True).status == "ok"
    assert asked == [tried]


def test_what_cannot_be_pinned():
    nothing = Pinned(nbytes=0, status=2)
    linux = check_pinning(machine(gpu(), memlock=65536, pin=nothing), WANTS, on_gpu=True)
    assert linux.status == "warning"
    assert "64 KiB" in linux.found
    assert "ulimit -l unlimited" in linux.advice
    assert "18.00 GiB" in linux.expected
    assert ".wslconfig" in check_pinning(wsl(), None, on_gpu=True).advice
    assert check_pinning(machine(pin=nothing), None, on_gpu=False).status == "ok"
    a_part = check_pinning(wsl(pin=Pinned(nbytes=896 * MIB, status=2)), WANTS, on_gpu=True)
    assert "896 MiB pinned" in a_part.found
    assert "through a little memory that is pinned" in a_part.why


def test_wsl():
    assert check_wsl(wsl()).status == "warning"
    assert check_wsl(machine()).status == "ok"


@pytest.mark.parametrize(
    ("free", "converted", "status"),
    [(500, False, "ok"), (20, False, "warning"), (20, True, "ok"), (0.5, True, "problem"), (0.5, False, "problem")],
)
def test_disk(free, converted, status):
    found = check_disk(machine(disk_free=int(free * GIB)), Path("/data"), WANTS, converted=converted)
    assert found.status == status
    assert found.check == "disk /data"
