"""Plans of processes whose weights stay for the next video."""

from __future__ import annotations

import dataclasses

import pytest

from lowvram.offload.placement import PlanOptions
from lowvram.planning import CARDS, Workload, plan
from lowvram.planning.members import Machines
from lowvram.planning.memory import later_text, staying
from lowvram.planning.planner import plan_team
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.planning.rank_plan import DoesNotFit, Plan
from lowvram_kernels.errors import ConfigError

GIB = 1 << 30


def planned(sizes, budget_gib: float, *, resident: bool, size: str = "704*384", ram_gib: int = 64) -> Plan:
    return plan(
        sizes("int8"),
        Workload.of_size(size),
        PlanOptions(resident=resident),
        vram_bytes=int(budget_gib * GIB),
        ram_bytes=ram_gib * GIB,
        card=CARDS["rtx4090"],
    )


@pytest.mark.parametrize("budget_gib", [9, 12, 16, 20, 22.15, 30, 46, 79])
def test_voice_and_portrait_of_a_later_video_are_encoded_beside_the_weights(sizes, budget_gib):
    once, stays = (planned(sizes, budget_gib, resident=resident) for resident in (False, True))
    there = staying(stays.device)
    for stage in ("encode_audio", "encode_image"):
        assert stays.stage_peaks[stage] == once.stage_peaks[stage] + there
    assert stays.fits
    assert stays.peak_vram_bytes <= budget_gib * GIB
    assert stays.seconds_per_block <= once.seconds_per_block * 1.05


@pytest.mark.parametrize(("budget_gib", "on_host"), [(12, True), (20, True), (22.15, False), (79, False)])
def test_a_new_prompt_is_encoded_beside_the_weights_where_there_is_room(sizes, budget_gib, on_host):
    """20 GiB hold all layers, and no text encoder as well."""
    found = planned(sizes, budget_gib, resident=True)
    assert found.placement.later_text_on_host == on_host
    assert any(("beside them there is no room" in note) == on_host for note in found.notes if "next video" in note)
    text = later_text(sizes("int8"), found.workload, found.device)
    assert (found.stage_peaks["encode_text"] == text) != on_host


def test_what_is_held_for_the_next_video_is_counted_on_the_host(sizes):
    once, stays = (planned(sizes, 22.15, resident=resident) for resident in (False, True))
    audio = 4 * sizes("int8").audio.parameters
    assert once.host.held == 0
    assert stays.host.held == audio + sizes("int8").vae_bytes + sizes("int8").start.nbytes
    assert stays.peak_host_bytes == once.peak_host_bytes + stays.host.held


def test_a_host_without_room_for_it_refuses(sizes):
    once = planned(sizes, 22.15, resident=False)
    ram = (once.peak_host_bytes + GIB) / GIB
    with pytest.raises(DoesNotFit, match="of host memory needed"):
        plan(
            sizes("int8"),
            dataclasses.replace(once.workload),
            PlanOptions(resident=True, offload_kv_cache=True, offload_model=True),
            vram_bytes=int(22.15 * GIB),
            ram_bytes=int(ram * GIB),
            card=CARDS["rtx4090"],
        )


@pytest.mark.parametrize("layout", [ParallelLayout(num_gpus_dit=2), ParallelLayout(num_gpus_dit=1, vae_rank=True)])
def test_it_is_of_one_rank(sizes, layout):
    ranks = layout.world_size
    there = Machines(
        cards=[CARDS["rtx4090"]] * ranks,
        vram_bytes=[22 * GIB] * ranks,
        machines=[0] * ranks,
        ram_bytes=[64 * GIB],
    )
    with pytest.raises(ConfigError, match=f"which one rank does, and {ranks} were to be planned"):
        plan_team(sizes("int8"), Workload.of_size("704*384"), layout, there, PlanOptions(resident=True))
