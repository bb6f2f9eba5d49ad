"""What a plan keeps free beside tensors, measured or assumed, and what NCCL was seen to take."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console

from lowvram.planning import CARDS, Workload, plan_team
from lowvram.planning.layout_choice import Compared
from lowvram.planning.library_memory import (
    FLAT_BYTES,
    NCCL_FLAT_BYTES,
    SLACK_BYTES,
    OutsideAllocator,
    group_bytes,
    measuring_group,
)
from lowvram.planning.measure import card_at_hand
from lowvram.planning.members import Machines
from lowvram.planning.memory_costs import GIB, MIB
from lowvram.planning.rank_layout import ParallelLayout, share_of, whole
from lowvram.planning.rank_plan import reserve_of
from lowvram.planning.team_report import print_team, team_to_json
from tests.lowvram.planning.test_measure import FakeRunner

WORK = Workload.of_size("704*384")
OUTSIDE = OutsideAllocator(context=GIB, cublas=20 * MIB, modules=30 * MIB, vae=((WORK.pixels, 50 * MIB),))
CARD = CARDS["rtx4090"]


class Taken:
    """A card of which something is taken in a group's first exchange."""

    key = FakeRunner().key

    def __init__(self, *taken: int):
        self._taken = iter(taken)

    def outside(self) -> int:
        return next(self._taken)


@pytest.mark.parametrize("outside", [None, OUTSIDE])
@pytest.mark.parametrize("nccl", [(), ((2, 500 * MIB),), ((4, 500 * MIB),)])
@pytest.mark.parametrize("ulysses", [1, 2])
@pytest.mark.parametrize("grouped", [False, True])
def test_each_part_is_measured_or_assumed(sizes, outside, nccl, ulysses, grouped):
    config = sizes("int8").config
    share = share_of(config, WORK, ParallelLayout(num_gpus_dit=2, ulysses_size=ulysses), 0)
    found = reserve_of(dataclasses.replace(CARD, outside=outside, nccl=nccl), WORK, share, grouped=grouped)
    assert (found.outside, found.outside_measured) == ((FLAT_BYTES, False) if outside is None else (100 * MIB, True))
    exchanges = ulysses == 2 and not grouped
    known = exchanges and bool(nccl) and nccl[0][0] == ulysses
    assert (found.nccl, found.nccl_measured) == ((500 * MIB if known else NCCL_FLAT_BYTES) * exchanges, known)
    assert found.total == found.outside + found.nccl + SLACK_BYTES


def test_a_rank_alone_reserves_nothing_for_nccl(sizes):
    work = whole(sizes("int8").config, WORK)
    assert reserve_of(CARD, WORK, work, grouped=False).nccl == 0


def test_a_group_is_measured_and_known_to_the_card_the_next_time(tmp_path):
    for ranks, taken in ((2, (100, 400)), (4, (100, 900)), (2, (200, 450))):
        with measuring_group(Taken(*taken), ranks, file=tmp_path / "grouped.json"):
            pass
    card = card_at_hand(None, runner=FakeRunner(), file=tmp_path / "cards.json")
    assert card.nccl == ((2, 250), (4, 800))


def test_another_card_is_measured_for_itself(tmp_path):
    file = tmp_path / "grouped.json"
    with measuring_group(Taken(0, 5), 2, file=file):
        pass
    assert group_bytes(f"{Taken.key} Ti", file=file) == group_bytes(Taken.key[:-1], file=file) == ()


@pytest.mark.parametrize("taken", [(100, 100), (400, 100)])
def test_memory_that_another_process_gives_back_meanwhile_is_no_measurement(tmp_path, taken):
    with measuring_group(Taken(*taken), 2, file=tmp_path / "grouped.json"):
        pass
    assert group_bytes(Taken.key, file=tmp_path / "grouped.json") == ()


def test_an_exchange_that_fails_is_no_measurement(tmp_path):
    with pytest.raises(RuntimeError), measuring_group(Taken(0, 100), 2, file=tmp_path / "grouped.json"):
        raise RuntimeError("peers cannot reach each other")
    assert group_bytes(Taken.key, file=tmp_path / "grouped.json") == ()


@pytest.mark.parametrize("values", ["no JSON", '{"x": -1}', '{"x": "1"}', '{"x": true}', "[1]"])
def test_a_damaged_file_counts_as_none(tmp_path, values):
    file = tmp_path / "grouped.json"
    file.write_text(values)
    assert group_bytes(Taken.key, file=file) == ()
    with measuring_group(Taken(0, 7), 3, file=file):
        pass
    assert list(json.loads(file.read_text()).values()) == [7]


def test_without_a_card_nothing_is_measured(tmp_path):
    with measuring_group(None, 2, file=tmp_path / "grouped.json"):
        pass
    assert not (tmp_path / "grouped.json").exists()


@pytest.mark.parametrize(
    ("card", "libraries", "nccl"),
    [
        (CARD, "assumed", "assumed"),
        (dataclasses.replace(CARD, outside=OUTSIDE), "measured on this card", "assumed"),
        (dataclasses.replace(CARD, nccl=((2, 300 * MIB),)), "assumed", "measured on this card"),
    ],
)
def test_a_plan_says_what_was_measured(sizes, card, libraries, nccl):
    team = plan_team(
        sizes("int8"), WORK, ParallelLayout(num_gpus_dit=2, ulysses_size=2),
        Machines(cards=[card] * 2, vram_bytes=[22 * GIB] * 2, machines=[0, 0], ram_bytes=[60 * GIB]),
    )  # fmt: skip
    console = Console(width=200, record=True, file=io.StringIO())
    print_team(Compared(team=team, alternatives=(), refusal=None), console)
    said = console.export_text()
    assert f"reserve: libraries and kernels, {libraries}" in said
    assert f"reserve: NCCL, {nccl}" in said
    for rank in team_to_json(team)["ranks"]:
        assert rank["reserve"]["nccl_measured"] == (nccl != "assumed")
        assert rank["reserve"]["outside_measured"] == (libraries != "assumed")
        parts = rank["reserve"]
        assert rank["reserve_bytes"] == parts["outside"] + parts["nccl"] + parts["slack"]
