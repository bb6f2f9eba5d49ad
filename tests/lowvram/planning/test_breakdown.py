"""Where the seconds of a block go: rows add up, every rate of the table counts, and what was measured takes over."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from lowvram.cli import main
from lowvram.offload.placement import PlanOptions
from lowvram.planning import CARDS, Machines, Workload, plan, plan_team
from lowvram.planning.activation_passes import launches, pass_bytes
from lowvram.planning.breakdown import breakdown_table, rows_of_tasks, shown
from lowvram.planning.memory_costs import GIB
from lowvram.planning.operation_rates import BOUNDS, OPERATION_RATES, Range
from lowvram.planning.rank_layout import ParallelLayout, whole
from lowvram.planning.timing import Seconds

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
WORK = Workload.of_size("704*384")
# Card, weights, GiB of it, rings: what limits a block differs.
CASES = [
    ("rtx4090", "int8", 22.15, "auto"),
    ("rtx4090", "bf16", 22.15, "auto"),
    ("rtx4090", "fp8", 12.0, "int8"),
    ("rtx3090", "fp8", 22.15, "bf16"),
    ("h100", "int8", 78.0, "bf16"),
    ("a100-80gb", "bf16", 78.0, "int8"),
    ("t4", "int8", 14.0, "int8"),
]


def planned(sizes, card="rtx4090", precision="int8", gib=22.15, kv="auto", **asked):
    options = PlanOptions(kv=kv, **asked)
    on = CARDS[card] if isinstance(card, str) else card
    return plan(sizes(precision), WORK, options, vram_bytes=int(gib * GIB), ram_bytes=200 * GIB, card=on)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_rows_add_up_to_the_block(sizes, case):
    found = planned(sizes, *case)
    every = rows_of_tasks(found.tasks)
    rows = [row for row in every if not row.overlap]
    assert {row.name for row in rows} == {task.name for task in found.tasks}
    for place, bound in enumerate(BOUNDS):
        added = sum(task.seconds(bound) for task in found.tasks)
        hidden = sum(row.seconds[place] for row in every if row.overlap)
        assert hidden <= 0
        assert added + hidden == pytest.approx(found.seconds_at(bound).block, rel=1e-12)
        assert sum(row.seconds[place] for row in rows) == pytest.approx(added, rel=1e-12)
    assert all(0 < low <= expected <= high for low, expected, high in (row.seconds for row in rows))
    low, high = found.seconds_range
    assert low < found.seconds_per_block < high


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_what_is_printed_adds_up_as_it_stands(sizes, case):
    found = planned(sizes, *case)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(breakdown_table(rows_of_tasks(found.tasks), "Seconds"))
    numbers = [re.findall(r"│\s+(-?\d+)\b(?= +│| +┃)", line.replace("┃", "│")) for line in captured.get().splitlines()]
    rows = [[int(value) for value in row] for row in numbers if len(row) == 3]
    assert len(rows) == len(rows_of_tasks(found.tasks)) + 1
    *parts, total = rows
    assert [sum(column) for column in zip(*parts, strict=True)] == total
    assert total[1] == pytest.approx(found.seconds_per_block * 1000, abs=0.51)


@pytest.mark.parametrize(
    "values", [[0.0004] * 10, [1.2345, -0.2345], [0.1, 0.2, 0.3], [2.0], [0.0005, 0.0005, -0.0004]]
)
def test_what_is_shown_adds_up_in_whole_steps(values):
    found = shown(values)
    assert sum(found) == pytest.approx(round(sum(values), 3), abs=1e-9)
    assert all(abs(a - b) <= 0.001 + 1e-9 for a, b in zip(found, values, strict=True))


def of_everything(sizes):
    """Plans that make use of every rate together: all kinds of weights and rings, streaming, ranks that exchange."""
    team = plan_team(
        sizes("int8"),
        WORK,
        ParallelLayout(num_gpus_dit=2, ulysses_size=2),
        Machines(cards=[CARDS["rtx4090"]] * 2, vram_bytes=[12 * GIB] * 2, machines=[0, 0], ram_bytes=[200 * GIB]),
    )
    alone = [
        planned(sizes, "h100", precision, 70, kv) for precision in ("int8", "fp8", "bf16") for kv in ("int8", "bf16")
    ]
    return [*alone, planned(sizes, gib=40, cuda_graphs=True), *team.ranks]


@pytest.mark.parametrize("name", OPERATION_RATES)
def test_a_rate_changed_in_one_place_moves_the_prediction(sizes, monkeypatch, name):
    """Faster where more is done a second, slower where more is to be done, and nothing else moves."""
    before = of_everything(sizes)
    operation = OPERATION_RATES[name]
    monkeypatch.setitem(OPERATION_RATES, name, operation.times(0.5 if operation.per_second else 2.0))
    moved = 0
    for was in before:
        now = [dataclasses.replace(task) for task in _again(sizes, was)]
        for old, new in zip(was.tasks, now, strict=True):
            changed = old.reached != new.reached or old.each != new.each
            ratio = new.seconds("expected") / old.seconds("expected")
            assert ratio == pytest.approx(2.0 if changed else 1.0)
            moved += changed
        assert Seconds.of(now).block >= was.seconds_per_block
    assert moved


def _again(sizes, was):
    """The same placement with the table as it is now."""
    from lowvram.planning.timing import block_tasks

    precision = was.precision
    graphs = any(task.name == "host, replays of layers" for task in was.tasks)
    return block_tasks(sizes(precision), was.workload, was.placement, was.card.rates, was.share, cuda_graphs=graphs)


# Where each of these is halved, a block is longer: what is on the critical path of a single card.
CRITICAL = [
    "int8 Linear",
    "int8 attention",
    "16 or 32 bit attention",
    "VAE convolution",
    "own memory",
    "start of a kernel",
    "PCIe",
]


@pytest.mark.parametrize("name", CRITICAL)
def test_the_block_follows(sizes, monkeypatch, name):
    before = planned(sizes).seconds_per_block
    operation = OPERATION_RATES[name]
    monkeypatch.setitem(OPERATION_RATES, name, operation.times(0.5 if operation.per_second else 2.0))
    assert planned(sizes).seconds_per_block > before + 0.003


@pytest.mark.parametrize("name", OPERATION_RATES)
def test_every_rate_has_a_range_and_a_reason(name):
    operation = OPERATION_RATES[name]
    for figures in (operation.share, *operation.on.values(), operation.of_measured or operation.share):
        assert 0 < figures.least <= figures.expected <= figures.most
        if operation.per_second and name != "exchange":
            assert figures.most <= 1.04
    assert operation.source
    assert len(operation.why) > 40


def test_what_was_timed_on_the_card_takes_the_place_of_a_share(sizes):
    card = CARDS["rtx4090"]
    timed = dataclasses.replace(card.rates, timed=(("int8 Linear", 3e14), ("VAE convolution", 1e14)))
    found = {task.name: task for task in planned(sizes, dataclasses.replace(card, rates=timed)).tasks}
    usual = {task.name: task for task in planned(sizes).tasks}
    for name in ("Linears, int8", "decoding, convolutions"):
        assert found[name].reached.source == "timed by selftest"
        assert found[name].seconds("expected") == found[name].amount / (3e14 if "Linear" in name else 1e14)
        assert found[name].seconds("high") < usual[name].seconds("high") * 2
    assert found["attention, p v, int8"] == usual["attention, p v, int8"]


def test_where_the_host_is_the_slowest_it_is_said(sizes, monkeypatch):
    operation = OPERATION_RATES["launch by the host"]
    monkeypatch.setitem(OPERATION_RATES, "launch by the host", operation.times(5))
    found = planned(sizes, "h100", gib=78)
    assert found.limited_by == "launches"
    assert found.seconds.host > found.seconds.arithmetic
    replayed = planned(sizes, "h100", gib=78, cuda_graphs=True)
    assert replayed.limited_by == "arithmetic"
    assert replayed.seconds_per_block < found.seconds_per_block


def test_launches_are_those_that_were_counted(sizes):
    counted = json.loads((RESULTS / "host_time.json").read_text())["tables"]["after"]["rings"]
    for kv in ("int8", "plain"):
        assert launches(sizes("int8").config, kv, 4) == pytest.approx(counted[kv]["block"]["launches"], rel=0.15)
    every = launches(sizes("int8").config, "int8", 4)
    graphs = [launches(sizes("int8").config, "int8", 4, replayed) for replayed in (0, 40, 80, 160)]
    assert graphs == sorted(graphs, reverse=True)
    assert graphs[0] == every
    assert 0 < graphs[-1] < every / 10
    assert launches(sizes("int8").config, "int8", 0) == 0


def test_passes_move_less_where_linears_take_8_bit_and_more_where_rings_are_laid_out(sizes):
    config, share = sizes("int8").config, whole(sizes("int8").config, WORK)
    narrow = pass_bytes(config, WORK, share, "int8", eight_bit=True)
    # By hand: 43 bytes a value of the width and 3 of the feed-forward's, a layer; 18 more in 12 audio injections.
    tokens = WORK.block_tokens
    assert narrow.between == tokens * (40 * (5120 * 43 + 3 * 13824) + 12 * 18 * 5120 + 4 * 5120)
    assert narrow.rings == 40 * tokens * 5120 * 13
    plain = pass_bytes(config, WORK, share, "plain", eight_bit=True)
    assert plain.rings > 4 * narrow.rings
    assert plain.between == narrow.between


def test_ranges_of_seconds_are_the_other_way_round():
    share, count = Range(0.5, 0.7, 0.9), Range(8, 12, 18)
    assert [share.for_seconds(bound) for bound in BOUNDS] == [0.9, 0.7, 0.5]
    assert [count.for_seconds(bound, per_second=False) for bound in BOUNDS] == [8, 12, 18]


PLAN = [
    "plan",
    "--preset",
    "14b",
    "--gpu",
    "rtx4090",
    "--vram-budget",
    "22.15GiB",
    "--ram",
    "64GiB",
    "--size",
    "704*384",
]


def test_the_command_prints_and_writes_it(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    told = json.loads(CliRunner().invoke(main, [*PLAN, "--json"]).stdout)
    low, high = told["seconds_range"]
    for bound, seconds in zip(BOUNDS, (low, told["seconds_per_block"], high), strict=True):
        assert sum(row["seconds"][bound] for row in told["breakdown"]) == pytest.approx(seconds)
    text = CliRunner().invoke(main, PLAN).stdout
    assert "Where the seconds of a block go" in text
    assert f"{told['seconds_per_block']:.2f} s ({low:.2f} to {high:.2f} s)" in text
    for row in told["breakdown"]:
        assert row["operation"] in text


def test_of_several_the_slowest_of_each_stage_is_shown(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    told = json.loads(CliRunner().invoke(main, [*PLAN, "--gpus", "5", "--json"]).stdout)
    low, high = told["seconds_range"]
    assert low < told["seconds_per_block"] < high
    for rank in told["ranks"]:
        assert sum(row["seconds"]["expected"] for row in rank["breakdown"]) == pytest.approx(rank["seconds_per_block"])
    text = CliRunner().invoke(main, [*PLAN, "--gpus", "5"]).stdout
    assert text.count("Where the seconds of a block go") >= 2
    assert "a block go: VAE" in text
