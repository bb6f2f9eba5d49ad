"""Which layout a number of GPUs gets: all that there are, planned, and the one that is taken unless told otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from lowvram.offload.placement import MemoryOptions
from lowvram.planning.cards import Card
from lowvram.planning.model_sizes import ModelFacts, facts_of
from lowvram.planning.planner import TeamPlan, plan_team
from lowvram.planning.rank_layout import ParallelLayout, chosen_layout, layouts
from lowvram.planning.rank_plan import DoesNotFit
from lowvram.planning.workload import Workload
from lowvram_quantize.format import Artifact


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machines:
    """What ranks run on, and what they may take of it; each as in ``plan_team``."""

    cards: Sequence[Card]
    vram_bytes: Sequence[int]
    machines: Sequence[int]
    ram_bytes: Sequence[int]
    grouped: bool = False

    @property
    def gpus(self) -> int:
        return len(self.cards)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a user asks for; each as in ``plan_team``, and None of a layout leaves it to the choice."""

    kv: str = "auto"
    wave: str | int = "auto"
    offload_model: bool = False
    offload_kv: bool = False
    cuda_graphs: bool = False
    t5_cpu: bool = False
    num_gpus_dit: int | None = None
    ulysses_size: int | None = None
    vae_rank: bool | None = None

    @classmethod
    def of(cls, memory: MemoryOptions, *, num_gpus_dit: int | None = None, vae_rank: bool | None = None) -> Wishes:
        """What a run's options ask for."""
        return cls(
            kv=memory.kv,
            wave=memory.wave,
            offload_model=memory.offload_model,
            offload_kv=memory.offload_kv_cache,
            cuda_graphs=memory.cuda_graphs,
            t5_cpu=memory.t5_cpu,
            num_gpus_dit=num_gpus_dit,
            vae_rank=vae_rank,
        )


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
    artifact: Artifact | ModelFacts, workload: Workload, there: Machines, wishes: Wishes | None = None
) -> tuple[Alternative, ...]:
    """Every layout of all GPUs, planned; of ``wishes`` those for layouts do not count.

    Raises:
        ConfigError: a wish that cannot be met.
    """
    facts = artifact if isinstance(artifact, ModelFacts) else facts_of(artifact)
    return _planned(_layouts(facts, workload, there), facts, workload, there, wishes or Wishes())


def choose_team(
    artifact: Artifact | ModelFacts, workload: Workload, there: Machines, wishes: Wishes | None = None
) -> TeamPlan:
    """The plan that a run takes: whether one GPU is the VAE's is settled by ``chosen_layout``; of stages and
    ``ulysses_size``, where they are not given, those that are predicted to be the fastest. Always the same of the same.

    Raises:
        ConfigError: wishes that do not add up to the GPUs, or that cannot be met.
        DoesNotFit: no layout that was allowed fits; of the one that ``chosen_layout`` would take.
    """
    facts = artifact if isinstance(artifact, ModelFacts) else facts_of(artifact)
    wishes = wishes or Wishes()
    first = chosen_layout(
        there.gpus,
        sample_steps=workload.sample_steps,
        heads=facts.config.num_heads,
        num_gpus_dit=wishes.num_gpus_dit,
        ulysses_size=wishes.ulysses_size,
        vae_rank=wishes.vae_rank,
    )
    allowed = [first]
    if wishes.ulysses_size is None:
        every = _layouts(facts, workload, there)
        allowed += [layout for layout in every if layout.vae_rank == first.vae_rank and layout != first]
    found = _planned(allowed, facts, workload, there, wishes)
    best = min(found, key=lambda alternative: alternative.rank)
    if best.plan is not None:
        return best.plan
    assert found[0].refusal is not None
    raise found[0].refusal


def _layouts(facts: ModelFacts, workload: Workload, there: Machines) -> list[ParallelLayout]:
    every = layouts(there.gpus, sample_steps=workload.sample_steps, heads=facts.config.num_heads)
    return [layout for layout in every if layout.ulysses_size <= workload.tokens_per_frame]


def plan_layout(
    artifact: Artifact | ModelFacts, workload: Workload, layout: ParallelLayout, there: Machines, wishes: Wishes
) -> TeamPlan:
    """``plan_team`` of one layout; of ``wishes`` those for layouts do not count.

    Raises:
        ConfigError, DoesNotFit: as there.
    """
    return plan_team(
        artifact,
        workload,
        layout,
        cards=there.cards,
        vram_bytes=there.vram_bytes,
        machines=there.machines,
        ram_bytes=there.ram_bytes,
        grouped=there.grouped,
        kv=wishes.kv,
        wave=wishes.wave,
        offload_model=wishes.offload_model,
        offload_kv=wishes.offload_kv,
        cuda_graphs=wishes.cuda_graphs,
        t5_cpu=wishes.t5_cpu,
    )


def _planned(
    every: Iterable[ParallelLayout], facts: ModelFacts, workload: Workload, there: Machines, wishes: Wishes
) -> tuple[Alternative, ...]:
    found = []
    for layout in every:
        try:
            found.append(Alternative(layout=layout, plan=plan_layout(facts, workload, layout, there, wishes)))
        except DoesNotFit as refusal:
            found.append(Alternative(layout=layout, plan=None, refusal=refusal))
    return tuple(found)
