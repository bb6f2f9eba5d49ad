"""Decisions from options to a placement. The GPU is invented."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lowvram.offload import replaying
from lowvram.offload.placement import MemoryOptions, Placement
from lowvram.parallel.team import SingleRank
from lowvram.planning import CARDS, Workload, measure
from lowvram.planning import decide as deciding
from lowvram.planning.cards import Card, Rates
from lowvram.planning.decide import Decision, decide, staying_bytes
from lowvram.planning.library_memory import FLAT_BYTES, MODULES_BYTES, SLACK_BYTES, OutsideAllocator
from lowvram.planning.members import Machines
from lowvram.planning.rank_layout import ParallelLayout
from lowvram_kernels.errors import ConfigError, OutOfMemoryError
from lowvram_quantize.format import Artifact
from lowvram_quantize.shape_artifact import write_shape_artifact

GIB = 1 << 30
GPU = torch.device("cuda", 0)
WORK = Workload.of_size("704*384")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    return Artifact.open(write_shape_artifact(tmp_path_factory.mktemp("shapes") / "14b"))


@pytest.fixture
def card(monkeypatch) -> Card:
    """A card of 80 GB of which 70 GiB are free."""
    card = dataclasses.replace(CARDS["a100-80gb"], usable_bytes=70 * GIB)
    monkeypatch.setattr(deciding, "card_at_hand", lambda device: card)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    return card


@dataclasses.dataclass
class Allocator:
    """torch's, on the card of ``card``: bytes that somebody ``holds``, and bytes that are ``cached``. ``others``
    are taken by other programs."""

    holds: int = 0
    cached: int = 0
    others: int = 10 * GIB

    def empty_cache(self) -> None:
        self.cached = 0

    def free(self) -> int:
        return 80 * GIB - self.others - self.holds - self.cached

    def measure(self, *_: object, **__: object) -> Rates:
        """Leaves what it took behind, as torch's allocator does."""
        self.cached += GIB
        return CARDS["a100-80gb"].rates


@pytest.fixture
def allocator(card, monkeypatch) -> Allocator:
    """What ``card_at_hand`` finds is that of the allocator."""
    found = Allocator()
    monkeypatch.setattr(deciding, "card_at_hand", measure.card_at_hand)
    monkeypatch.setattr(measure, "rates_of", found.measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(torch.cuda, "empty_cache", found.empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (found.free(), 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: found.holds + found.cached)
    monkeypatch.setattr(measure, "outside_allocator", lambda *_, **__: None)
    monkeypatch.setattr(measure, "driver_version", lambda: "1")
    return found


def test_a_budget_is_the_cap_of_process_and_plan(artifact, card):
    options = MemoryOptions(vram_budget=20 * GIB, ram_budget=48 * GIB)
    found = decide(artifact, WORK, GPU, options, SingleRank())
    plan, placement = found.plan, found.placement
    assert found.cap_bytes == 20 * GIB - MODULES_BYTES
    assert plan.placement == placement
    assert 0.95 * 20 * GIB < plan.peak_vram_bytes <= 20 * GIB
    assert placement.host_rings
    assert placement.kv == "int8"


def test_without_a_budget_the_process_is_capped_a_little_above_the_plan(artifact, card):
    found = decide(artifact, WORK, GPU, MemoryOptions(ram_budget=48 * GIB), SingleRank())
    plan, placement = found.plan, found.placement
    assert 1.02 * plan.peak_vram_bytes < found.cap_bytes < 1.12 * plan.peak_vram_bytes < 70 * GIB
    assert plan.vram_budget_bytes == 70 * GIB
    assert (placement.host_rings, placement.streamed_layers) == ((), ())


def test_a_budget_beyond_what_is_free_is_not_believed(artifact, card):
    found = decide(artifact, WORK, GPU, MemoryOptions(vram_budget=79 * GIB, ram_budget=48 * GIB), SingleRank())
    assert found.plan.vram_budget_bytes == 70 * GIB


@pytest.mark.parametrize("options", [{"vram_budget": 4 * GIB}, {"ram_budget": 4 * GIB, "vram_budget": 20 * GIB}])
def test_what_cannot_fit_is_refused_with_bytes(artifact, card, options):
    with pytest.raises(OutOfMemoryError, match=r"needed at the least.* GiB there"):
        decide(artifact, WORK, GPU, MemoryOptions(**({"ram_budget": 48 * GIB} | options)), SingleRank())


def test_what_is_to_be_offloaded_is(artifact, card):
    options = MemoryOptions(ram_budget=64 * GIB, offload_model=True, offload_kv_cache=True, kv="bf16", wave=2)
    placement = decide(artifact, WORK, GPU, options, SingleRank()).placement
    assert len(placement.streamed_layers) == 40
    assert len(placement.host_rings) == 160
    assert (placement.kv, placement.wave) == ("plain", 2)


@pytest.fixture
def seen_to_replay():
    """The card passed the selftest's check of graphs."""
    replaying.trust(GPU)
    yield
    replaying.reset()


@pytest.mark.parametrize(
    ("options", "having"),
    [
        ({}, True),  # 70 GiB: everything stays, and there is room beside
        ({"cuda_graphs": False}, False),
        ({"vram_budget": 20 * GIB}, False),  # the room for graphs would move rings to the host
        ({"offload_model": True, "ram_budget": 64 * GIB}, False),
        ({"offload_kv_cache": True, "ram_budget": 64 * GIB}, False),
        ({"cuda_graphs": True, "vram_budget": 20 * GIB}, True),  # asked for, whatever it moves
    ],
    ids=str,
)
def test_layers_are_replayed_where_that_was_seen_to_be_right_and_moves_nothing(
    artifact, card, seen_to_replay, options, having
):
    found = decide(artifact, WORK, GPU, MemoryOptions(**({"ram_budget": 48 * GIB} | options)), SingleRank())
    assert found.cuda_graphs is having
    assert (found.plan.device.graphs > 0) is having
    without = MemoryOptions(**({"ram_budget": 48 * GIB} | options | {"cuda_graphs": False}))
    if "cuda_graphs" not in options:
        assert found.placement == decide(artifact, WORK, GPU, without, SingleRank()).placement


def test_a_card_that_nobody_examined_replays_nothing_unless_asked(artifact, card):
    assert not decide(artifact, WORK, GPU, MemoryOptions(ram_budget=48 * GIB), SingleRank()).cuda_graphs
    asked = MemoryOptions(ram_budget=48 * GIB, cuda_graphs=True)
    assert decide(artifact, WORK, GPU, asked, SingleRank()).cuda_graphs


def test_a_placement_by_hand_is_taken_as_it_is(artifact, card):
    by_hand = Placement(streamed_layers=(3,))
    assert decide(artifact, WORK, GPU, MemoryOptions(placement=by_hand), SingleRank()) == Decision(placement=by_hand)


TWO_CARDS = Machines(
    cards=[CARDS["rtx4090"]] * 2, vram_bytes=[22 * GIB, 16 * GIB], machines=[0, 0], ram_bytes=[64 * GIB]
)


class Ranks(SingleRank):
    """Rank 1 of two that share tokens and heads, with two cards of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.layout = ParallelLayout(num_gpus_dit=2, ulysses_size=2)
        self.role = self.layout.role(1)

    def share(self, what: str, value: int) -> list[int]:
        self.told = value
        return [22 * GIB, value]


def test_a_rank_gets_its_part_of_the_plan_of_all(artifact, card, monkeypatch):
    monkeypatch.setattr(deciding, "free_bytes", lambda device: 60 * GIB)
    found = decide(artifact, WORK, GPU, MemoryOptions(vram_budget=16 * GIB), Ranks(), TWO_CARDS)
    assert found.cap_bytes == 16 * GIB - MODULES_BYTES
    assert found.plan == found.team.ranks[1]
    assert found.plan.vram_budget_bytes == 16 * GIB
    assert len(found.placement.streamed_layers) > len(found.team.ranks[0].placement.streamed_layers)
    assert "plan for 2 ranks" in found.summary()


def test_more_ranks_than_heads_are_refused(artifact, card):
    ranks = Ranks()
    ranks.layout = ParallelLayout(num_gpus_dit=41, ulysses_size=41)
    with pytest.raises(ConfigError, match="41 for 40 heads"):
        decide(artifact, WORK, GPU, MemoryOptions(), ranks, TWO_CARDS)


def test_ranks_plan_with_what_their_groups_have_left(artifact, card, monkeypatch):
    """What was told before groups were made is not there any more; nothing is reserved for them a second time."""
    monkeypatch.setattr(deciding, "free_bytes", lambda device: 15 * GIB)
    ranks = Ranks()
    found = decide(artifact, WORK, GPU, MemoryOptions(), ranks, TWO_CARDS)
    assert ranks.told == found.plan.vram_budget_bytes == 15 * GIB
    assert found.plan.reserve_bytes == FLAT_BYTES + SLACK_BYTES
    assert found.plan.reserve.nccl == 0


def test_what_an_earlier_run_left_in_the_allocator_is_free_for_the_next(artifact, allocator):
    options = MemoryOptions(ram_budget=48 * GIB)
    first = decide(artifact, WORK, GPU, options, SingleRank())
    assert first.plan.vram_budget_bytes == 70 * GIB  # measuring has left nothing behind
    allocator.cached = 55 * GIB
    assert decide(artifact, WORK, GPU, options, SingleRank()) == first


@pytest.mark.parametrize("budget", [None, 40 * GIB])
def test_what_an_earlier_run_still_holds_is_taken(artifact, allocator, budget):
    allocator.holds, allocator.cached = 15 * GIB, 30 * GIB
    options = MemoryOptions(ram_budget=48 * GIB, vram_budget=budget)
    found = decide(artifact, WORK, GPU, options, SingleRank())
    expected = (budget or 70 * GIB) - 15 * GIB
    assert found.plan.vram_budget_bytes == expected
    # The cap is of the process, which holds both.
    assert 15 * GIB + found.plan.peak_vram_bytes - MODULES_BYTES <= found.cap_bytes <= 15 * GIB + expected


def test_a_process_that_holds_its_whole_budget_is_refused_more(artifact, allocator):
    allocator.holds = 30 * GIB
    with pytest.raises(OutOfMemoryError, match=r"0\.00 GiB there"):
        decide(artifact, WORK, GPU, MemoryOptions(vram_budget=20 * GIB, ram_budget=48 * GIB), SingleRank())


def test_a_placement_by_hand_is_capped_at_the_budget_alone(artifact, card):
    by_hand = MemoryOptions(placement=Placement(), vram_budget=20 * GIB)
    assert decide(artifact, WORK, GPU, by_hand, SingleRank()).cap_bytes == 20 * GIB


def test_measured_modules_are_left_out_of_the_cap_and_reserved(artifact, card, monkeypatch):
    outside = OutsideAllocator(context=GIB, cublas=1 << 20, modules=300 << 20, vae=((WORK.pixels, 200 << 20),))
    measured = dataclasses.replace(CARDS["a100-80gb"], usable_bytes=70 * GIB, outside=outside)
    monkeypatch.setattr(deciding, "card_at_hand", lambda device: measured)
    options = MemoryOptions(vram_budget=20 * GIB, ram_budget=48 * GIB)
    found = decide(artifact, WORK, GPU, options, SingleRank())
    assert found.plan.reserve_bytes == SLACK_BYTES + (501 << 20)
    assert found.cap_bytes == 20 * GIB - (300 << 20)


def test_weights_that_stay_are_no_room_that_is_lacking(artifact, allocator):
    """A later video of another size is planned as if nothing lay there: its plan counts the weights itself."""
    options = MemoryOptions(vram_budget=int(22.15 * GIB), ram_budget=48 * GIB, resident=True)
    first = decide(artifact, WORK, GPU, options, SingleRank())
    assert first.plan is not None
    allocator.holds = there = staying_bytes(artifact, first.plan, first.placement)
    assert there > 14 * GIB
    again = decide(artifact, WORK, GPU, options, SingleRank(), staying=there)
    assert again.plan is not None
    assert (again.placement, again.cap_bytes) == (first.placement, first.cap_bytes)
    assert (again.plan.stage_peaks, again.plan.vram_budget_bytes) == (
        first.plan.stage_peaks,
        first.plan.vram_budget_bytes,
    )
    smaller = decide(artifact, Workload.of_size("384*256"), GPU, options, SingleRank(), staying=there)
    assert smaller.plan is not None
    assert not smaller.placement.streamed_layers
    assert len(smaller.placement.host_rings) < len(first.placement.host_rings)
    assert smaller.cap_bytes is not None
    assert smaller.cap_bytes <= 22.15 * GIB
    with pytest.raises(OutOfMemoryError):
        decide(artifact, WORK, GPU, dataclasses.replace(options, ram_budget=8 * GIB), SingleRank())
