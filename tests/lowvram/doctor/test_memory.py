from __future__ import annotations

from pathlib import Path

import pytest

from lowvram.doctor.memory import LARGEST_TRY_BYTES, TRY_BYTES, check_disk, check_pinning, check_ram, check_wsl
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
    ("limit", "tried"),
    [(None, TRY_BYTES), (8 * MIB, 72 * MIB), (200 * MIB, 264 * MIB), (64 * GIB, LARGEST_TRY_BYTES)],
)
def test_more_is_pinned_than_the_limit_allows(limit, tried):
    asked = []

    def pin(nbytes):
        asked.append(nbytes)
        return 0

    assert check_pinning(machine(gpu(), memlock=limit, pin=pin), WANTS, on_gpu=True).status == "ok"
    assert asked == [tried]


def test_what_cannot_be_pinned():
    linux = check_pinning(machine(gpu(), memlock=65536, pin=2), WANTS, on_gpu=True)
    assert linux.status == "warning"
    assert "64 KiB" in linux.found
    assert "ulimit -l unlimited" in linux.advice
    assert "18.00 GiB" in linux.expected
    assert ".wslconfig" in check_pinning(wsl(), None, on_gpu=True).advice
    assert check_pinning(machine(pin=2), None, on_gpu=False).status == "ok"


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
