from __future__ import annotations

import dataclasses

import pytest

from lowvram.planning import CARDS, DoesNotFit, Machines, Workload, alternatives, choose_team
from lowvram.planning.layout_choice import Alternative, _layouts
from lowvram.planning.memory_costs import GIB
from lowvram.planning.rank_layout import LayoutOptions, ParallelLayout, layouts
from lowvram_kernels.errors import ConfigError

WORK = Workload.of_size("704*384")


def machines(gpus: int, gib: float = 22.15, ram_gib: float = 64, card: str = "rtx4090") -> Machines:
    return Machines(
        cards=[CARDS[card]] * gpus,
        vram_bytes=[int(gib * GIB)] * gpus,
        machines=[0] * gpus,
        ram_bytes=[int(ram_gib * GIB)],
    )


@pytest.mark.parametrize(
    ("gpus", "dit", "vae"), [(1, 1, False), (2, 2, False), (3, 3, False), (4, 3, True), (5, 4, True)]
)
def test_defaults(sizes, gpus, dit, vae):
    layout = choose_team(sizes("int8"), WORK, machines(gpus)).layout
    assert (layout.num_gpus_dit, layout.vae_rank) == (dit, vae)


@pytest.mark.parametrize("gpus", [2, 3, 4, 5, 8])
def test_the_fastest_of_what_is_allowed_is_taken(sizes, gpus):
    found = choose_team(sizes("int8"), WORK, machines(gpus))
    every = alternatives(sizes("int8"), WORK, machines(gpus))
    assert [each.layout for each in every] == list(layouts(gpus, sample_steps=4, heads=40))
    allowed = [each.plan for each in every if each.plan and each.layout.vae_rank == found.layout.vae_rank]
    assert found.seconds_per_block == min(plan.seconds_per_block for plan in allowed)
    assert found in allowed


@pytest.mark.parametrize(("latent", "most"), [((8, 8), 10), ((8, 10), 20), ((10, 8), 20), ((8, 12), 20), ((9, 8), 10)])
def test_no_rank_is_without_a_token(sizes, latent, most):
    """Of 20 GPUs, and 16 to 24 tokens a latent frame."""
    every = _layouts(sizes("int8"), dataclasses.replace(WORK, latent_size=latent), machines(20))
    assert max(layout.ulysses_size for layout in every) == most


def test_of_equally_fast_ones_that_with_more_stages(sizes):
    plan = choose_team(sizes("int8"), WORK, machines(4))
    layouts_of_4 = [ParallelLayout(num_gpus_dit=4, ulysses_size=size) for size in (4, 1, 2)]
    ranked = sorted((Alternative(layout=each, plan=plan) for each in layouts_of_4), key=lambda each: each.rank)
    assert [each.layout.stages for each in ranked] == [4, 2, 1]
    assert Alternative(layout=layouts_of_4[1], plan=None).rank > ranked[-1].rank


def test_what_is_given_is_kept(sizes):
    def layout(gpus, **asked):
        return choose_team(sizes("int8"), WORK, machines(gpus), None, LayoutOptions(**asked)).layout

    assert layout(4, num_gpus_dit=3, ulysses_size=3, enable_vae_parallel=True) == ParallelLayout(
        num_gpus_dit=3, ulysses_size=3, vae_rank=True
    )
    assert layout(4, enable_vae_parallel=False).num_gpus_dit == 4
    assert layout(4, num_gpus_dit=4) == layout(4, enable_vae_parallel=False)
    assert layout(3, enable_vae_parallel=True).num_gpus_dit == 2
    assert layout(5, ulysses_size=2) == ParallelLayout(num_gpus_dit=4, ulysses_size=2, vae_rank=True)


def test_a_layout_that_does_not_fit_stays_with_its_reason(sizes):
    small = machines(2, gib=4.9)
    every = alternatives(sizes("int8"), WORK, small)
    refused = [each for each in every if each.plan is None]
    assert refused
    assert all("does not fit on rank" in str(each.refusal) for each in refused)
    with pytest.raises(DoesNotFit, match="does not fit on rank"):
        choose_team(sizes("int8"), WORK, machines(2, gib=2))


def test_one_that_fits_is_taken_before_one_that_does_not(sizes):
    every = {each.layout: each for each in alternatives(sizes("bf16"), WORK, machines(4, ram_gib=42))}
    fitting = [layout for layout, each in every.items() if each.plan and layout.vae_rank]
    refused = [layout for layout, each in every.items() if not each.plan and layout.vae_rank]
    assert fitting
    assert refused
    assert choose_team(sizes("bf16"), WORK, machines(4, ram_gib=42)).layout in fitting


def test_layouts_that_do_not_add_up_are_refused(sizes):
    for gpus, asked in (
        (4, {"num_gpus_dit": 2}),
        (4, {"num_gpus_dit": 4, "enable_vae_parallel": True}),
        (5, {"ulysses_size": 3}),
    ):
        with pytest.raises(ConfigError, match=r"--num_gpus_dit \d"):
            choose_team(sizes("int8"), WORK, machines(gpus), None, LayoutOptions(**asked))
