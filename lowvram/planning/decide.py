"""Decision over a run's placement: planned for a GPU, plain on a CPU, by hand where that is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import psutil
import torch

from lowvram.offload.placement import MemoryOptions, Placement, PlanOptions, placement_on_cpu
from lowvram.offload.replaying import trusted
from lowvram.planning.library_memory import MODULES_BYTES
from lowvram.planning.measure import card_at_hand, free_bytes
from lowvram.planning.members import Machines
from lowvram.planning.memory import device_parts
from lowvram.planning.memory import staying as staying_of
from lowvram.planning.memory_costs import GIB
from lowvram.planning.model_sizes import model_sizes
from lowvram.planning.planner import TeamPlan, plan, plan_team
from lowvram.planning.rank_layout import ParallelLayout, Role
from lowvram.planning.rank_plan import Plan
from lowvram.planning.workload import Workload
from lowvram_kernels.errors import OutOfMemoryError
from lowvram_quantize.format import Artifact


class Ranks(Protocol):
    """What deciding asks of a ``lowvram.parallel.team.Team``."""

    layout: ParallelLayout
    role: Role

    def share(self, what: str, value: Any) -> list[Any]:
        """Every rank tells ``value``; all ranks' values in order."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """A rank's placement, the plan that it comes from where one was made, and the bytes that torch's allocator may take
    for it, None for any; ``team`` has the plans of all ranks. ``cuda_graphs``: layers are replayed as CUDA graphs."""

    placement: Placement
    cuda_graphs: bool = False
    plan: Plan | None = None
    team: TeamPlan | None = None
    cap_bytes: int | None = None

    def summary(self) -> str:
        """The plan in a line, "" without one."""
        plan = self.team or self.plan
        return plan.summary() if plan else ""


def decide(
    artifact: Artifact,
    work: Workload,
    device: torch.device,
    options: MemoryOptions,
    team: Ranks,
    machines: Machines | None = None,
    *,
    staying: int = 0,
) -> Decision:
    """The placement of this rank's part of a run; ``machines`` are what all ranks run on, where they are several GPUs.

    What an earlier run of this process still holds counts against ``options.vram_budget``, but for ``staying``: bytes
    of weights that this run finds on the device, and that its plan counts itself.

    Raises:
        OutOfMemoryError: nothing fits; with bytes needed and there.
        ConfigError: an option that does not fit the run.
    """
    config = artifact.component("dit").config
    team.layout.check(sample_steps=work.sample_steps, heads=config["num_heads"], tokens_per_frame=work.tokens_per_frame)
    if options.placement is not None:
        return Decision(
            placement=options.placement, cuda_graphs=bool(options.cuda_graphs), cap_bytes=options.vram_budget
        )
    if device.type != "cuda":
        stage = team.role.stage
        steps = range(0) if stage is None else team.layout.steps(stage, work.sample_steps)
        placement = placement_on_cpu(options, config["num_layers"], steps, work.sample_steps)
        return Decision(placement=placement, cuda_graphs=bool(options.cuda_graphs))
    if machines is not None:
        # What is free by now: groups of ranks are made, and have taken their part.
        free = free_bytes(device)
        held = torch.cuda.memory_reserved(device)
        told = team.share("room", allowed_bytes(free, options.vram_budget, held))
        there = dataclasses.replace(machines, vram_bytes=told, grouped=True)
        planned = plan_team(artifact, work, team.layout, there, options)
        mine, graphs = _graphs_too(
            options,
            device,
            planned.ranks[team.role.rank],
            lambda asked: plan_team(artifact, work, team.layout, there, asked).ranks[team.role.rank],
        )
        cap = held + allocator_bytes(mine)
        return Decision(placement=mine.placement, cuda_graphs=graphs, plan=mine, team=planned, cap_bytes=cap)
    card = card_at_hand(device)
    held = max(0, torch.cuda.memory_reserved(device) - staying)
    allowed = allowed_bytes(card.usable_bytes + staying, options.vram_budget, held)
    ram = options.ram_budget or psutil.virtual_memory().available

    def planned_for(asked: PlanOptions) -> Plan:
        return plan(artifact, work, asked, vram_bytes=allowed, ram_bytes=ram, card=card)

    found, graphs = _graphs_too(options, device, planned_for(options), planned_for)
    return Decision(placement=found.placement, cuda_graphs=graphs, plan=found, cap_bytes=held + allocator_bytes(found))


def staying_bytes(artifact: Artifact, plan: Plan, placement: Placement) -> int:
    """Of the device, what weights take that stay from a run that was planned so, and ended with ``placement``."""
    return staying_of(device_parts(model_sizes(artifact), plan.workload, placement, plan.share))


def _graphs_too(
    options: MemoryOptions, device: torch.device, planned: Plan, plan_again: Callable[[PlanOptions], Plan]
) -> tuple[Plan, bool]:
    """The plan, and whether layers are replayed as CUDA graphs. Where nobody said so, they are if the card was seen to
    replay right, and if their memory is there without moving anything to the host: what a launch costs is little where
    the host runs ahead of the card, and copies cost more."""
    if options.cuda_graphs is not None:
        return planned, options.cuda_graphs
    if not trusted(device) or options.offload_model or options.offload_kv_cache:
        return planned, False
    try:
        having = plan_again(dataclasses.replace(options, cuda_graphs=True))
    except OutOfMemoryError:
        return planned, False
    if having.placement != planned.placement or not having.device.graphs:
        return planned, False
    return having, True


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
