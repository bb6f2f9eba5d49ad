"""Ranks that share a run: how each gives way to the memory of its machine, and which of several ways is taken."""

from __future__ import annotations

import dataclasses

import pytest

from lowvram.offload.placement import PlanOptions
from lowvram.planning import CARDS, DoesNotFit, Machines, Workload, plan_team
from lowvram.planning.members import Member, _rank, settle
from lowvram.planning.memory_costs import GIB
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.planning.rank_plan import Budgets, reserve_of
from lowvram.planning.search import Job

CARD = CARDS["rtx4090"]
WORK = Workload.of_size("704*384")


def member(sizes, *, gib: float = 78, rank: int = 0, layout: ParallelLayout | None = None, **options) -> Member:
    job = Job(sizes=sizes, work=WORK, kv="int8", rank=rank, layout=layout or ParallelLayout())
    job = dataclasses.replace(job, text_device="cpu", options=PlanOptions(**options))
    reserve = reserve_of(CARD, WORK, job.share, grouped=True)
    return Member(job=job, card=CARD, budgets=Budgets(vram=int(gib * GIB), ram=400 * GIB, reserve=reserve), machine=0)


@pytest.mark.parametrize(
    ("gib", "asked", "streamed"),
    [(78, 5, 0), (78, 40, 0), (78, 0, 0), (12, 40, 40), (14, 35, 35)],
    ids=["room for all", "and for what others stream", "none", "no room", "little room"],
)
def test_layers_that_others_stream_stay_where_no_ring_comes_of_it(sizes, gib, asked, streamed):
    found = member(sizes("int8"), gib=gib).streaming(asked, wave=1)
    assert len(found.streamed_layers) == streamed


def test_all_layers_go_where_that_is_asked_for(sizes):
    found = member(sizes("int8"), offload_model=True).streaming(40, wave=1)
    assert len(found.streamed_layers) == 40


@pytest.mark.parametrize("order", [1, -1])
def test_of_ranks_that_work_at_once_the_slowest_counts(sizes, order):
    """Whichever of them it is."""
    layout = ParallelLayout(num_gpus_dit=2)
    ranks = [member(sizes("int8"), rank=rank, layout=layout) for rank in (0, 1)][::order]
    placements = tuple(rank.job.placement(streamed, 0, 1) for rank, streamed in zip(ranks, (0, 40), strict=True))
    seconds = [m.job.seconds(p, CARD.rates) for m, p in zip(ranks, placements, strict=True)]
    blocks, transfers = [each.block for each in seconds], [each.pcie for each in seconds]
    assert abs(blocks[0] - blocks[1]) > 0.01
    assert abs(transfers[0] - transfers[1]) > 0.01
    assert _rank(ranks, placements)[:2] == (max(blocks), max(transfers))


@pytest.mark.parametrize("wave", [1, 2, 3, 4])
def test_a_wave_that_was_asked_for_stays_where_memory_is_short(sizes, wave):
    """The host has less than the fastest placement wants, so another is looked for: in no other wave."""
    alone = Machines(cards=[CARD], vram_bytes=[16 * GIB], machines=[0], ram_bytes=[400 * GIB])
    options, model = PlanOptions(wave=wave), sizes("bf16")
    wanted = plan_team(model, WORK, ParallelLayout(), alone, options)
    short = dataclasses.replace(alone, ram_bytes=[wanted.host[0].peak - GIB])
    try:
        found = plan_team(model, WORK, ParallelLayout(), short, options).ranks[0]
    except DoesNotFit as refused:
        found = refused.plan
    assert found.placement != wanted.ranks[0].placement or not found.fits
    assert found.placement.wave == wave


def test_the_same_ranks_come_to_the_same(sizes):
    ranks = [member(sizes("int8"), gib=20)]
    assert settle(ranks, [64 * GIB]) == settle(ranks, [64 * GIB])
