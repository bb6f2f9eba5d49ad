"""From options and a workload to a placement: planned for a GPU, plain on a CPU, by hand where that is asked for."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import psutil
import torch

from lowvram.offload.placement import MemoryOptions, Placement, placement_on_cpu
from lowvram.planning.layout_choice import Machines, Wishes, plan_layout
from lowvram.planning.library_memory import MODULES_BYTES
from lowvram.planning.measure import card_at_hand, free_bytes
from lowvram.planning.memory_costs import GIB
from lowvram.planning.planner import TeamPlan, plan
from lowvram.planning.rank_layout import ParallelLayout, Role
from lowvram.planning.rank_plan import Plan
from lowvram.planning.report import to_json
from lowvram.planning.workload import Workload
from lowvram_quantize.format import Artifact


class Ranks(Protocol):
    """What deciding asks of a ``lowvram.parallel.team.Team``."""

    layout: ParallelLayout
    role: Role
    there: Machines | None

    def share(self, what: str, value: Any) -> list[Any]:
        """Every rank tells ``value``; all ranks' values in order."""
        ...


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


def lay_out(artifact: Artifact, work: Workload, device: torch.device, options: MemoryOptions, team: Ranks) -> LaidOut:
    """The placement of this rank's part of a run.

    On a GPU the process is capped at what was planned for: what goes beyond fails as on a card of that size, and is
    met by giving way, instead of taking memory from other programs, or spilling into the host's as Windows' driver
    lets it. What an earlier run of this process still holds counts against ``options.vram_budget``.

    Raises:
        OutOfMemoryError: nothing fits; with bytes needed and there.
        ConfigError: an option that does not fit the run.
    """
    config = artifact.component("dit").config
    team.layout.check(sample_steps=work.sample_steps, heads=config["num_heads"], tokens_per_frame=work.tokens_per_frame)
    if options.placement is not None:
        if device.type == "cuda":
            cap_process(device, options.vram_budget)
        return LaidOut(placement=options.placement)
    if device.type != "cuda":
        stage = team.role.stage
        steps = range(0) if stage is None else team.layout.steps(stage, work.sample_steps)
        return LaidOut(placement=placement_on_cpu(options, config["num_layers"], steps, work.sample_steps))
    cap_process(device, None)  # an earlier run of this process may have been capped lower
    if team.there is not None:
        # What is free by now: groups of ranks are made, and have taken their part.
        free = free_bytes(device)
        held = torch.cuda.memory_reserved(device)
        told = team.share("room", allowed_bytes(free, options.vram_budget, held))
        there = dataclasses.replace(team.there, vram_bytes=told, grouped=True)
        planned = plan_layout(artifact, work, team.layout, there, Wishes.of(options))
        mine = planned.ranks[team.role.rank]
        cap_process(device, held + allocator_bytes(mine))
        return LaidOut(placement=mine.placement, plan=mine, team=planned)
    card = card_at_hand(device)
    held = torch.cuda.memory_reserved(device)
    found = plan(
        artifact,
        work,
        vram_bytes=allowed_bytes(card.usable_bytes, options.vram_budget, held),
        ram_bytes=options.ram_budget or psutil.virtual_memory().available,
        card=card,
        kv=options.kv,
        wave=options.wave,
        offload_model=options.offload_model,
        offload_kv=options.offload_kv_cache,
        cuda_graphs=options.cuda_graphs,
        t5_cpu=options.t5_cpu,
    )
    cap_process(device, held + allocator_bytes(found))
    return LaidOut(placement=found.placement, plan=found)


def allowed_bytes(free: int, budget: int | None, held: int) -> int:
    """What a new run may take of a card, of which this process holds ``held`` bytes already: the rest of its budget,
    and no more than is free."""
    return free if budget is None else max(0, min(budget - held, free))


def allocator_bytes(plan: Plan) -> int:
    """What torch's allocator may take for a plan. All that the plan may, where it fills that; of a card with more room
    a sixteenth and a GiB above the plan, because an allocator that nothing presses joins less. Modules of kernels lie
    outside of it."""
    modules = MODULES_BYTES if plan.card.outside is None else plan.card.outside.modules
    peak = plan.peak_vram_bytes
    return min(plan.vram_budget_bytes, peak + peak // 16 + GIB) - modules


def cap_process(device: torch.device, nbytes: int | None) -> None:
    """Let torch's allocator take so many bytes of the card and no more; None lifts what was set before."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if nbytes is None else min(1.0, nbytes / total), device)
