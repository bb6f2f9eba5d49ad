"""The VAE's 8-bit decoder is widened once where the card has room for it beside everything else, and never else."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lowvram.planning import CARDS, Workload
from lowvram.planning.members import Machines
from lowvram.planning.memory_costs import GIB
from lowvram.planning.planner import plan, plan_team
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.planning.report import to_json

CARD = CARDS["rtx4090"]
BF16, FP32 = torch.bfloat16, torch.float32


def planned(sizes, gib: float, size: str = "384*256", dtype: torch.dtype = BF16):
    work = Workload.of_size(size, dtype=dtype)
    return plan(sizes, work, vram_bytes=int(gib * GIB), ram_bytes=96 * GIB, card=CARD)


@pytest.mark.parametrize(
    ("precision", "gib", "dtype", "wide"),
    [
        ("int8", 48, BF16, True),
        ("fp8", 48, BF16, True),
        ("int8", 60, FP32, True),
        ("bf16", 78, BF16, False),  # nothing is narrow
        ("fp32", 100, FP32, False),
    ],
)
def test_where_there_is_room(sizes, precision, gib, dtype, wide):
    found = planned(sizes(precision), gib, dtype=dtype)
    assert found.placement.wide_vae is wide
    assert to_json(found)["placement"]["wide_vae"] is wide
    narrow = sizes(precision).vae_decoder
    assert bool(narrow) == (precision in ("int8", "fp8"))
    said = [note for note in found.notes if "VAE" in note]
    assert len(said) == bool(narrow)
    if wide:
        values = sum(narrow)
        assert values == pytest.approx(73.4e6, rel=0.01)  # the published decoder's parameters
        assert 1 <= found.device.vae / (values * dtype.itemsize) < 1.05  # what the allocator rounds large tensors up to
        assert "widened once" in said[0]


@pytest.mark.parametrize("spare", [-1, 0, 1, 4096, 1 << 20])
def test_a_byte_too_few_and_it_is_as_before(sizes, spare):
    """Of the card with just the room for the placement with the wide decoder, and a little less or more."""
    roomy = planned(sizes("int8"), 48)
    assert not roomy.placement.streamed_layers
    needed = roomy.peak_vram_bytes
    found = plan(
        sizes("int8"), roomy.workload, vram_bytes=needed + spare, ram_bytes=96 * GIB, card=CARD
    )  # the same reserve
    assert found.placement == dataclasses.replace(roomy.placement, wide_vae=spare >= 0)
    assert found.peak_vram_bytes <= needed + spare
    if spare < 0:
        note = next(note for note in found.notes if "VAE" in note)
        assert "widened at every use" in note
        assert "no room" in note


@pytest.mark.parametrize("gib", [12, 16, 20, 22.15, 24])
def test_nothing_goes_to_the_host_for_it(sizes, gib):
    bare = dataclasses.replace(sizes("int8"), vae_decoder=())
    found, before = planned(sizes("int8"), gib, "704*384"), planned(bare, gib, "704*384")
    assert dataclasses.replace(found.placement, wide_vae=False) == before.placement
    assert found.seconds == before.seconds
    assert found.fits


def test_the_rank_with_the_vae_alone_has_it(sizes):
    layout = ParallelLayout(num_gpus_dit=4, ulysses_size=1, vae_rank=True)
    there = Machines(cards=[CARD] * 5, vram_bytes=[23 * GIB] * 5, machines=[0] * 5, ram_bytes=[256 * GIB])
    ranks = plan_team(sizes("int8"), Workload.of_size("704*384"), layout, there).ranks
    assert [rank.placement.wide_vae for rank in ranks] == [False] * 4 + [True]
