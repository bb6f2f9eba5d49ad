from __future__ import annotations

import dataclasses

import pytest

from lowvram.doctor.probes import Names
from lowvram.doctor.ranks import (
    check_backend,
    check_left_over,
    check_names,
    check_peers,
    check_port,
    check_shared_memory,
    check_threads,
)
from tests.lowvram.doctor.invented import GIB, LOOPING, MIB, NAMES, gpu, h200, machine, rtx3090

OFF = {"NCCL_P2P_DISABLE": "1"}


def peers(cards, **answers):
    return check_peers(machine(*cards, **answers), cards)


def test_cards_apart():
    cards = [gpu(0), gpu(1)]
    found = peers(cards, peers=False)
    assert found.status == "warning"
    assert found.advice == "export NCCL_P2P_DISABLE=1"
    assert "hangs" in found.why
    assert peers(cards, peers=False, environ=OFF).status == "ok"


def test_a_driver_that_claims_what_geforce_cards_do_not_have():
    found = peers([gpu(0), gpu(1)], peers=True)
    assert found.status == "warning"
    assert "wrong bytes" in found.why
    assert peers([rtx3090(0), rtx3090(1)], peers=True).status == "ok"


def test_one_direction_is_enough_to_be_said():
    found = peers([rtx3090(0), rtx3090(1), rtx3090(2)], peers=lambda a, b: (a, b) != (2, 1))
    assert found.status == "warning"
    assert "2 -> 1" in found.found


def test_peers_switched_off_without_need():
    cards = [h200(0), h200(1)]
    assert peers(cards, environ=OFF).status == "warning"
    assert peers(cards, environ=OFF).advice.startswith("unset")
    assert peers(cards, environ={"NCCL_P2P_DISABLE": "0"}).status == "ok"


@pytest.mark.parametrize(
    ("on_gpu", "nccl", "gloo", "statuses"),
    [
        (True, "2.28.9", True, ["ok", "ok"]),
        (True, None, True, ["problem", "ok"]),
        (False, None, True, ["ok", "ok"]),
        (False, None, False, ["ok", "problem"]),
    ],
)
def test_backends(on_gpu, nccl, gloo, statuses):
    assert [f.status for f in check_backend(machine(nccl=nccl, gloo=gloo), on_gpu=on_gpu)] == statuses


@pytest.mark.parametrize(
    ("free", "ranks", "status"),
    [
        (None, 4, "warning"),
        (64 * MIB, 4, "problem"),
        (64 * MIB, 2, "ok"),
        (GIB, 4, "ok"),  # weights that ranks share do not lie there
    ],
)
def test_shared_memory(free, ranks, status):
    assert check_shared_memory(machine(shared_memory=lambda: free), ranks, on_gpu=True).status == status


def test_shared_memory_says_how_much_to_give():
    found = check_shared_memory(machine(shared_memory=MIB), 8, on_gpu=True)
    assert "--shm-size=2g" in found.advice  # 28 pairs of 64 MiB
    for free in (MIB, None):
        assert check_shared_memory(machine(shared_memory=lambda free=free: free), 4, on_gpu=False).status == "ok"


def test_the_port():
    asked = []

    def bind(port):
        asked.append(port)
        return "taken by another program"

    found = check_port(machine(bind=bind), 1234)
    assert asked == [1234]
    assert found.status == "problem"
    assert "1234" in found.found
    assert "40000" in found.advice
    assert check_port(machine(), 1234).status == "ok"


@pytest.mark.parametrize(
    ("names", "environ", "status"),
    [
        (NAMES, {}, "ok"),
        (LOOPING, {}, "warning"),
        (dataclasses.replace(NAMES, addresses=()), {}, "warning"),
        (dataclasses.replace(NAMES, addresses=("93.184.216.34",)), {}, "warning"),  # another machine's
        (LOOPING, {"GLOO_SOCKET_IFNAME": "eth0"}, "ok"),
        (NAMES, {"GLOO_SOCKET_IFNAME": "eth"}, "problem"),  # gloo wants the whole name
        (NAMES, {"NCCL_SOCKET_IFNAME": "eth"}, "ok"),
        (NAMES, {"NCCL_SOCKET_IFNAME": "=eth"}, "problem"),
        (NAMES, {"NCCL_SOCKET_IFNAME": "ib0"}, "problem"),
        (NAMES, {"NCCL_SOCKET_IFNAME": "^docker"}, "ok"),
    ],
)
def test_names(names, environ, status):
    assert check_names(machine(names=names, environ=environ)).status == status


def test_the_interface_to_set_is_one_that_others_reach():
    found = check_names(
        machine(names=dataclasses.replace(LOOPING, interfaces={"docker0": ("172.17.0.1",)} | NAMES.interfaces))
    )
    assert "GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0" in found.advice
    alone = Names(host="box", addresses=("127.0.0.1",), interfaces={"lo": ("127.0.0.1", "fe80::1%lo")})
    assert check_names(machine(names=alone)).advice.startswith("connect a network")


@pytest.mark.parametrize(
    ("value", "on_gpu", "status"),
    [
        (None, True, "ok"),
        (None, False, "warning"),
        ("4", True, "ok"),
        ("4", False, "ok"),
        ("16", True, "warning"),
        ("1", False, "warning"),
        ("many", True, "problem"),
        ("0", True, "problem"),
    ],
)
def test_threads(value, on_gpu, status):
    environ = {} if value is None else {"OMP_NUM_THREADS": value}
    found = check_threads(machine(environ=environ), 4, on_gpu=on_gpu)
    assert found.status == status
    assert status == "ok" or found.advice == "export OMP_NUM_THREADS=4"


def test_more_ranks_than_cores():
    assert check_threads(machine(cores=2, environ={"OMP_NUM_THREADS": "1"}), 4, on_gpu=False).status == "ok"


@pytest.mark.parametrize(
    ("environ", "advice"),
    [
        ({}, ""),
        ({"MASTER_ADDR": "node", "LOCAL_RANK": "0"}, ""),
        ({"WORLD_SIZE": "1"}, "where nobody started ranks, unset WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "where nobody started ranks, unset RANK WORLD_SIZE"),
        ({"RANK": "x", "MASTER_PORT": "1"}, "where nobody started ranks, unset RANK MASTER_PORT"),
    ],
)
def test_variables_of_ranks_that_nobody_started(environ, advice):
    found = check_left_over(machine(environ=environ))
    assert (found.status, found.advice) == ("warning" if advice else "ok", advice)
    assert all(f"{name}={value}" in found.found for name, value in environ.items() if advice)
