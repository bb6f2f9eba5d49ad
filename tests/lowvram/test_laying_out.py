"""How options become a placement. The GPU is invented."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from lowvram import laying_out
from lowvram.laying_out import LaidOut, lay_out
from lowvram.parallel.layout import ParallelLayout
from lowvram.placement import MemoryOptions, Placement
from lowvram.planning import CARDS, Workload
from lowvram.planning.choice import Machines
from lowvram.team import Solo
from lowvram_kernels.errors import ConfigError, OutOfMemoryError
from lowvram_quantize.format import Artifact
from lowvram_quantize.phantom import write_phantom

GIB = 1 << 30
GPU = torch.device("cuda", 0)
WORK = Workload.of_size("704*384")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    return Artifact.open(write_phantom(tmp_path_factory.mktemp("phantom") / "14b"))


@pytest.fixture
def fractions(monkeypatch) -> list[float]:
    """A card of 80 GB of which 70 GiB are free; collects what the process is capped to."""
    seen: list[float] = []
    card = dataclasses.replace(CARDS["a100-80gb"], usable_bytes=70 * GIB)
    monkeypatch.setattr(laying_out, "card_at_hand", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: seen.append(share))
    return seen


def test_a_budget_caps_process_and_plan(artifact, fractions):
    options = MemoryOptions(vram_budget=20 * GIB, ram_budget=48 * GIB)
    found = lay_out(artifact, WORK, GPU, options, Solo())
    plan, placement = found.plan, found.placement
    assert fractions == [0.25]
    assert plan.placement == placement
    assert 0.95 * 20 * GIB < plan.peak_vram_bytes <= 20 * GIB
    assert placement.host_rings
    assert placement.kv == "int8"


def test_without_a_budget_what_is_free_is_filled_and_an_old_cap_is_lifted(artifact, fractions):
    found = lay_out(artifact, WORK, GPU, MemoryOptions(ram_budget=48 * GIB), Solo())
    assert fractions == [1.0]
    plan, placement = found.plan, found.placement
    assert plan.vram_budget_bytes == 70 * GIB
    assert (placement.host_rings, placement.streamed_layers) == ((), ())


def test_a_budget_beyond_what_is_free_is_not_believed(artifact, fractions):
    found = lay_out(artifact, WORK, GPU, MemoryOptions(vram_budget=79 * GIB, ram_budget=48 * GIB), Solo())
    assert found.plan.vram_budget_bytes == 70 * GIB


@pytest.mark.parametrize("options", [{"vram_budget": 4 * GIB}, {"ram_budget": 4 * GIB, "vram_budget": 20 * GIB}])
def test_what_cannot_fit_is_refused_with_bytes(artifact, fractions, options):
    with pytest.raises(OutOfMemoryError, match=r"needed at the least.* GiB there"):
        lay_out(artifact, WORK, GPU, MemoryOptions(**({"ram_budget": 48 * GIB} | options)), Solo())


def test_what_is_to_be_offloaded_is(artifact, fractions):
    options = MemoryOptions(ram_budget=64 * GIB, offload_model=True, offload_kv_cache=True, kv="bf16", wave=2)
    placement = lay_out(artifact, WORK, GPU, options, Solo()).placement
    assert len(placement.streamed_layers) == 40
    assert len(placement.host_rings) == 160
    assert (placement.kv, placement.wave) == ("plain", 2)


def test_a_placement_by_hand_is_taken_as_it_is(artifact, fractions):
    by_hand = Placement(streamed_layers=(3,))
    assert lay_out(artifact, WORK, GPU, MemoryOptions(placement=by_hand), Solo()) == LaidOut(placement=by_hand)


class Ranks(Solo):
    """Rank 1 of two that share tokens and heads, with two cards of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.layout = ParallelLayout(num_gpus_dit=2, ulysses_size=2)
        self.role = self.layout.role(1)
        self.there = Machines(
            cards=[CARDS["rtx4090"]] * 2,
            vram_bytes=[22 * GIB, 16 * GIB],
            machines=[0, 0],
            ram_bytes=[64 * GIB],
        )


def test_a_rank_gets_its_part_of_the_plan_of_all(artifact, fractions):
    found = lay_out(artifact, WORK, GPU, MemoryOptions(vram_budget=16 * GIB), Ranks())
    assert fractions == [0.2]
    assert found.plan == found.team.ranks[1]
    assert found.plan.vram_budget_bytes == 16 * GIB
    assert len(found.placement.streamed_layers) > len(found.team.ranks[0].placement.streamed_layers)
    assert "plan for 2 ranks" in found.summary()


def test_more_ranks_than_heads_are_refused(artifact, fractions):
    ranks = Ranks()
    ranks.layout = ParallelLayout(num_gpus_dit=41, ulysses_size=41)
    with pytest.raises(ConfigError, match="41 for 40 heads"):
        lay_out(artifact, WORK, GPU, MemoryOptions(), ranks)
