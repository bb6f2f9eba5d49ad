"""Weights, rings and the decoder's cache cross in an order that events hold up, wherever they lie."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lowvram.offload.copy_engine import Engine
from lowvram.offload.placement import Placement
from tests.lowvram.streams.checks import assert_ordered, checked
from tests.lowvram.streams.miniature import CELLS, Course, Miniature

ALL_LAYERS = (0, 1, 2, 3)
EVERYTHING_AWAY = Placement(streamed_layers=ALL_LAYERS, host_rings=CELLS)
FAILS = frozenset({0, 2, 4})


def work_of(course: Course):
    def work(engine: Engine) -> torch.Tensor:
        return Miniature(engine, course).run()

    return work


PLACEMENTS = {
    "resident": Placement(),
    "streamed": Placement(streamed_layers=ALL_LAYERS),
    "some streamed": Placement(streamed_layers=(1, 3), weight_slots=1),
    "rings on the host": Placement(host_rings=CELLS),
    "some rings on the host": Placement(host_rings=CELLS[1::3], ring_slots=1),
    "one ring on the host, more slots than rings": Placement(host_rings=CELLS[2:3], ring_slots=3),
    "nothing stays": EVERYTHING_AWAY,
    "many slots": Placement(streamed_layers=ALL_LAYERS, host_rings=CELLS, weight_slots=3, ring_slots=4),
}


@pytest.mark.parametrize("wave", [1, 2, 3])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_placement_is_in_order(monkeypatch, name, wave):
    placement = dataclasses.replace(PLACEMENTS[name], wave=wave)
    assert_ordered(monkeypatch, work_of(Course(start=placement, fails=FAILS)))


@pytest.mark.parametrize("name", ["nothing stays", "some rings on the host"])
def test_8_bit_rings_are_in_order(monkeypatch, name):
    placement = dataclasses.replace(PLACEMENTS[name], kv="int8", wave=2)
    assert_ordered(monkeypatch, work_of(Course(start=placement)))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_place_between_and_amid_passes_is_in_order(monkeypatch, name):
    moves = {
        3: Placement(streamed_layers=(0, 1), host_rings=CELLS[::2]),
        7: EVERYTHING_AWAY,
        -11: dataclasses.replace(EVERYTHING_AWAY, weight_slots=1, ring_slots=3),
        -12: Placement(streamed_layers=(2,), host_rings=CELLS),
    }
    moves = {at: dataclasses.replace(to, wave=2) for at, to in moves.items()}
    start = dataclasses.replace(PLACEMENTS[name], wave=2)
    assert_ordered(monkeypatch, work_of(Course(start=start, moves=moves, fails=FAILS)))


def test_the_checks_see_both_kinds_of_wrong_order(monkeypatch):
    """A copy that nobody waits for, and one that overtakes who still reads."""

    def forgets(engine: Engine) -> torch.Tensor:
        host, slot = engine.host_buffer(64).fill_(3), torch.zeros(64, dtype=torch.uint8)
        engine.copy_in(slot, host, engine.now())
        total = slot.sum()
        engine.settle()
        return total

    def overtakes(engine: Engine) -> torch.Tensor:
        host, slot = engine.host_buffer(64).fill_(3), torch.zeros(64, dtype=torch.uint8)
        total = slot.sum()
        engine.wait(engine.copy_in(slot, host))
        engine.settle()
        return total

    found = checked(monkeypatch, forgets)
    assert len(found.races) == 1
    assert "copies in writes" in found.races[0]
    assert "compute reads (aten::sum" in found.races[0]
    assert "compute has not waited for copies in" in found.races[0]
    assert (found.plain.item(), found.late.item()) == (192, 0)
    found = checked(monkeypatch, overtakes)
    assert [race.rpartition(": ")[2] for race in found.races] == ["copies in has not waited for compute"] * 2


def test_the_checks_see_memory_that_goes_back_too_early(monkeypatch):
    def frees(engine: Engine) -> torch.Tensor:
        host, slot = engine.host_buffer(64).fill_(3), torch.zeros(64, dtype=torch.uint8)
        engine.copy_out(host, slot, engine.now())
        del slot
        engine.settle()
        return host.clone()

    found = checked(monkeypatch, frees)
    assert [race.rpartition(": ")[2] for race in found.races] == ["nothing waited for copies out"]
    assert "compute gets the freed memory back" in found.races[0]


def test_the_checks_see_the_host_reading_and_writing_too_early(monkeypatch):
    def reads(engine: Engine) -> torch.Tensor:
        host, slot = engine.host_buffer(64).fill_(3), torch.zeros(64, dtype=torch.uint8)
        engine.wait(engine.copy_out(host, slot, engine.now()))  # the computation waits, the host does not
        seen = host.clone()
        engine.settle()
        return seen

    def writes(engine: Engine) -> torch.Tensor:
        host, slot = engine.host_buffer(64).fill_(3), torch.zeros(64, dtype=torch.uint8)
        moment = engine.copy_in(slot, host, engine.now())
        host.fill_(5)
        engine.wait(moment)
        return slot + 0

    for work in (reads, writes):
        assert any("host has not waited for copies" in race for race in checked(monkeypatch, work).races)
    found = checked(monkeypatch, writes)
    assert not torch.equal(found.late, found.plain)
