"""Layouts of a number of GPUs: all that there are, planned, and the one that is taken unless told otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from lowvram.offload.placement import PlanOptions
from lowvram.planning.members import Machines
from lowvram.planning.model_sizes import ModelSizes, model_sizes
from lowvram.planning.planner import TeamPlan, plan_team
from lowvram.planning.rank_layout import LayoutOptions, ParallelLayout, chosen_layout, layouts
from lowvram.planning.rank_plan import DoesNotFit
from lowvram.planning.workload import Workload
from lowvram_quantize.format import Artifact


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternative:
    """A layout with its plan, or with the refusal where it does not fit."""

    layout: ParallelLayout
    plan: TeamPlan | None
    refusal: DoesNotFit | None = None

    @property
    def rank(self) -> tuple[float, int]:
        """The smaller, the better: seconds a block; of equal ones more stages, which exchange nothing but latents."""
        return (self.plan.seconds_per_block if self.plan else float("inf")), -self.layout.stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """The plan that was chosen for several GPUs, or why there is none, and every layout that they can have."""

    team: TeamPlan | None
    refusal: DoesNotFit | None
    alternatives: tuple[Alternative, ...]


def alternatives(
    artifact: Artifact | ModelSizes, workload: Workload, there: Machines, options: PlanOptions | None = None
) -> tuple[Alternative, ...]:
    """Every layout of all GPUs, planned.

    Raises:
        ConfigError: an option that cannot be used.
    """
    sizes = artifact if isinstance(artifact, ModelSizes) else model_sizes(artifact)
    return _planned(_layouts(sizes, workload, there), sizes, workload, there, options)


def choose_team(
    artifact: Artifact | ModelSizes,
    workload: Workload,
    there: Machines,
    options: PlanOptions | None = None,
    layout: LayoutOptions | None = None,
) -> TeamPlan:
    """The plan that a run takes: whether one GPU is the VAE's is settled by ``chosen_layout``; of stages and
    ``ulysses_size``, where they are not given, those that are predicted to be the fastest. Always the same of the same.

    Raises:
        ConfigError: ``layout`` does not add up to the GPUs, or an option cannot be used.
        DoesNotFit: no layout that was allowed fits; of the one that ``chosen_layout`` would take.
    """
    sizes = artifact if isinstance(artifact, ModelSizes) else model_sizes(artifact)
    first = chosen_layout(there.gpus, layout, sample_steps=workload.sample_steps, heads=sizes.config.num_heads)
    allowed = [first]
    if layout is None or layout.ulysses_size is None:
        every = _layouts(sizes, workload, there)
        allowed += [each for each in every if each.vae_rank == first.vae_rank and each != first]
    found = _planned(allowed, sizes, workload, there, options)
    best = min(found, key=lambda alternative: alternative.rank)
    if best.plan is not None:
        return best.plan
    assert found[0].refusal is not None
    raise found[0].refusal


def _layouts(sizes: ModelSizes, workload: Workload, there: Machines) -> list[ParallelLayout]:
    every = layouts(there.gpus, sample_steps=workload.sample_steps, heads=sizes.config.num_heads)
    return [layout for layout in every if layout.ulysses_size <= workload.tokens_per_frame]


def _planned(
    every: Iterable[ParallelLayout], sizes: ModelSizes, workload: Workload, there: Machines, options: PlanOptions | None
) -> tuple[Alternative, ...]:
    found = []
    for layout in every:
        try:
            found.append(Alternative(layout=layout, plan=plan_team(sizes, workload, layout, there, options)))
        except DoesNotFit as refusal:
            found.append(Alternative(layout=layout, plan=None, refusal=refusal))
    return tuple(found)
