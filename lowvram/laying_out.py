"""From options and a workload to a placement: planned for a GPU, plain on a CPU, by hand where that is asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import psutil
import torch

from lowvram.placement import MemoryOptions, Placement, placement_on_cpu
from lowvram.planning.choice import Wishes, plan_layout
from lowvram.planning.measure import card_at_hand
from lowvram.planning.planner import Plan, plan
from lowvram.planning.table import to_json
from lowvram.planning.team import TeamPlan
from lowvram.planning.workload import Workload
from lowvram.team import Team
from lowvram_quantize.format import Artifact


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaidOut:
    """A rank's placement, and the plan that it comes from where one was made; ``team`` has those of all ranks."""

    placement: Placement
    plan: Plan | None = None
    team: TeamPlan | None = None

    def to_json(self) -> dict[str, Any] | None:
        return to_json(self.plan) if self.plan else None

    def summary(self) -> str:
        """The plan in a line, "" without one."""
        plan = self.team or self.plan
        return plan.summary() if plan else ""


def lay_out(artifact: Artifact, work: Workload, device: torch.device, options: MemoryOptions, team: Team) -> LaidOut:
    """The placement of this rank's part of a run.

    On a GPU, ``options.vram_budget`` caps the process: what goes beyond it fails as on a card of that size.

    Raises:
        OutOfMemoryError: nothing fits; with bytes needed and there.
        ConfigError: an option that does not fit the run.
    """
    config = artifact.component("dit").config
    team.layout.check(sample_steps=work.sample_steps, heads=config["num_heads"], tokens_per_frame=work.tokens_per_frame)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        # Also where there is no budget: an earlier run of this process may have set one.
        torch.cuda.set_per_process_memory_fraction(min(1.0, (options.vram_budget or total) / total), device)
    if options.placement is not None:
        return LaidOut(placement=options.placement)
    if device.type == "cpu":
        stage = team.role.stage
        steps = range(0) if stage is None else team.layout.steps(stage, work.sample_steps)
        return LaidOut(placement=placement_on_cpu(options, config["num_layers"], steps, work.sample_steps))
    if team.there is not None:
        planned = plan_layout(artifact, work, team.layout, team.there, Wishes.of(options))
        mine = planned.ranks[team.role.rank]
        return LaidOut(placement=mine.placement, plan=mine, team=planned)
    card = card_at_hand(device)
    found = plan(
        artifact,
        work,
        vram_bytes=min(options.vram_budget or card.usable_bytes, card.usable_bytes),
        ram_bytes=options.ram_budget or psutil.virtual_memory().available,
        card=card,
        kv=options.kv,
        wave=options.wave,
        offload_model=options.offload_model,
        offload_kv=options.offload_kv_cache,
        cuda_graphs=options.cuda_graphs,
    )
    return LaidOut(placement=found.placement, plan=found)
