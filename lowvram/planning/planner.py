"""Planner: from a model, a workload and budgets to what one rank or several do; refused before anything loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lowvram.byte_sizes import gib
from lowvram.offload.placement import Placement, PlanOptions
from lowvram.planning.cards import GIGA, LINK_BYTES_PER_S, Card
from lowvram.planning.members import Machines, Member, Shortfall, host_of, settle
from lowvram.planning.memory import MachineParts
from lowvram.planning.model_sizes import ModelSizes, model_sizes
from lowvram.planning.operation_rates import Bound
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.planning.rank_plan import (
    Budgets,
    DoesNotFit,
    Plan,
    advice,
    describe,
    kv_scheme,
    place_text_encoder,
    reserve_of,
    wave_of,
    words_of,
)
from lowvram.planning.search import Job
from lowvram.planning.timing import Seconds, range_words, slowest
from lowvram.planning.workload import Workload
from lowvram_kernels.errors import ConfigError
from lowvram_models.constants import FRAMES_PER_LATENT
from lowvram_quantize.format import Artifact


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeamPlan:
    """``ranks`` has a plan for every rank, ``machines`` the machine of each; ``host`` and ``ram_bytes`` are what each
    machine's ranks take of its memory together, and what they may.

    Stages work at once, on blocks that follow each other, and so does the VAE's own rank: in the steady state a block
    takes as long as the slowest of them.
    """

    layout: ParallelLayout
    workload: Workload
    ranks: tuple[Plan, ...]
    machines: tuple[int, ...]
    host: tuple[MachineParts, ...]
    ram_bytes: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def stages(self) -> tuple[Seconds, ...]:
        """Of each stage; its ranks wait for each other in every layer."""
        return self.stages_at("expected")

    def stages_at(self, bound: Bound) -> tuple[Seconds, ...]:
        members = [self.layout.members(stage) for stage in range(self.layout.stages)]
        return tuple(slowest(self.ranks[rank].seconds_at(bound) for rank in ranks) for ranks in members)

    @property
    def parts(self) -> dict[str, Seconds]:
        """All that work at once, by name."""
        return self.parts_at("expected")

    def parts_at(self, bound: Bound) -> dict[str, Seconds]:
        stages = {f"stage {index}": seconds for index, seconds in enumerate(self.stages_at(bound))}
        return stages | ({"VAE": self.ranks[-1].seconds_at(bound)} if self.layout.vae_rank else {})

    @property
    def seconds_per_block(self) -> float:
        return max(seconds.block for seconds in self.parts.values())

    @property
    def seconds_range(self) -> tuple[float, float]:
        """Of a block, low and high."""
        low, high = (max(each.block for each in self.parts_at(bound).values()) for bound in ("low", "high"))
        return low, high

    @property
    def slowest_ranks(self) -> dict[str, Plan]:
        """Of each of ``parts`` the rank whose block takes longest."""
        members = {f"stage {stage}": self.layout.members(stage) for stage in range(self.layout.stages)}
        slow = {
            name: max((self.ranks[rank] for rank in ranks), key=lambda plan: plan.seconds.block)
            for name, ranks in members.items()
        }
        return slow | ({"VAE": self.ranks[-1]} if self.layout.vae_rank else {})

    @property
    def frames_per_s(self) -> float:
        return FRAMES_PER_LATENT * self.workload.frames_per_block / self.seconds_per_block

    @property
    def limited_by(self) -> str:
        """The slowest part and what takes it longest, as "stage 0: exchange"."""
        parts = self.parts
        name = max(parts, key=lambda part: parts[part].block)
        return f"{name}: {parts[name].limited_by}"

    @property
    def first_block_s(self) -> float:
        """From the first denoising step to the first frames: the first block goes through all stages, one after the
        other. An upper bound, as later blocks are predicted: the first finds its rings empty."""
        decode = self.ranks[self.layout.media_rank].seconds.decode
        members = [self.layout.members(stage)[0] for stage in range(self.layout.stages)]
        waits = (_through(self.ranks[rank], seconds) for rank, seconds in zip(members, self.stages, strict=True))
        return sum(waits) + decode

    def summary(self) -> str:
        """The plan in a line."""
        highest = max(self.ranks, key=lambda plan: plan.peak_vram_bytes)
        host = ", ".join(
            f"{gib(parts.peak)} of {gib(there)}" for parts, there in zip(self.host, self.ram_bytes, strict=True)
        )
        return (
            f"plan for {len(self.ranks)} ranks, {self.layout.words()}: predicted are at most "
            f"{gib(highest.peak_vram_bytes)} of a device ({highest.share.role.name}), {host} on the host, all ranks "
            f"together, and {self.seconds_per_block:.2f} s a block ({self.limited_by}; "
            f"{range_words(*self.seconds_range)})"
        )


def _through(plan: Plan, seconds: Seconds) -> float:
    """Seconds that a stage's steps of the first block take: blocks that follow join its passes."""
    steps, wave = len(plan.share.steps), plan.placement.wave
    calls = sum(min(step, wave) for step in range(1, steps + 1))
    computing = (seconds.arithmetic + seconds.exchange) * calls / steps
    return max(computing, seconds.pcie * wave) + seconds.exposed


def plan(
    artifact: Artifact | ModelSizes,
    workload: Workload,
    options: PlanOptions | None = None,
    *,
    vram_bytes: int,
    ram_bytes: int,
    card: Card,
) -> Plan:
    """The fastest predicted placement of an artifact's model on one card: ``plan_team`` of a rank that does everything.

    Args:
        artifact: what ``convert`` wrote, or its sizes (``model_sizes``); only headers are read.
        options: what is not left to the plan.
        vram_bytes: what may be taken of the device, reserve included.
        ram_bytes: what may be taken of the host.
        card: its rates decide what is fastest, and what was measured on it what is kept free.

    Raises:
        ConfigError: a wave beyond the steps.
        DoesNotFit: (an OutOfMemoryError) nothing fits; the message has bytes needed, bytes there, and what would fit.
    """
    there = Machines(cards=[card], vram_bytes=[vram_bytes], machines=[0], ram_bytes=[ram_bytes])
    return plan_team(artifact, workload, ParallelLayout(), there, options).ranks[0]


def plan_team(
    artifact: Artifact | ModelSizes,
    workload: Workload,
    layout: ParallelLayout,
    there: Machines,
    options: PlanOptions | None = None,
    *,
    link_bytes_per_s: float = LINK_BYTES_PER_S,
) -> TeamPlan:
    """The fastest predicted placements of all ranks of a layout; of the same arguments always the same.

    Args:
        artifact: what ``convert`` wrote, or its sizes; only headers are read.
        there: what the ranks run on, and what they may take of it.
        options: for all ranks; a stage with fewer steps than ``wave`` shares a pass among all it has.
        link_bytes_per_s: what a rank sends the others of its stage in a second, while it receives as much.

    Raises:
        ConfigError: a layout that does not suit the model, or an option that cannot be used.
        DoesNotFit: (an OutOfMemoryError) nothing fits; names the rank or the machine, bytes needed and bytes there.
    """
    sizes = artifact if isinstance(artifact, ModelSizes) else model_sizes(artifact)
    options = options or PlanOptions()
    layout.check(
        sample_steps=workload.sample_steps, heads=sizes.config.num_heads, tokens_per_frame=workload.tokens_per_frame
    )
    there.check(layout)
    if options.resident and layout.world_size > 1:
        raise ConfigError(
            f"--resident lets weights stay for the next video, which one rank does, and {layout.world_size} were to be "
            "planned; leave one of them out"
        )
    job = Job(
        sizes=sizes,
        work=workload,
        kv=kv_scheme(options.kv, sizes),
        wave=wave_of(options.wave, workload.sample_steps),
        options=options,
        layout=layout,
        link_bytes_per_s=link_bytes_per_s,
    )
    members = [_member(dataclasses.replace(job, rank=rank), there) for rank in range(layout.world_size)]
    found = settle(members, there.ram_bytes)
    if isinstance(found, Shortfall):
        raise _refusal(members, found, there.ram_bytes)
    found = tuple(member.widened(placement) for member, placement in zip(members, found, strict=True))
    ranks = tuple(describe(m.job, p, m.budgets, m.card) for m, p in zip(members, found, strict=True))
    return TeamPlan(
        layout=layout,
        workload=workload,
        ranks=ranks,
        machines=tuple(there.machines),
        host=tuple(_machine(members, found, machine) for machine in range(len(there.ram_bytes))),
        ram_bytes=tuple(there.ram_bytes),
        notes=_notes(job, ranks),
    )


def _member(job: Job, there: Machines) -> Member:
    card, machine = there.cards[job.rank], there.machines[job.rank]
    budgets = Budgets(
        vram=there.vram_bytes[job.rank],
        ram=there.ram_bytes[machine],
        reserve=reserve_of(card, job.work, job.share, grouped=there.grouped),
    )
    member = Member(job=place_text_encoder(job, budgets.usable), card=card, budgets=budgets, machine=machine)
    return member.with_wave(job.wave) if job.wave else member


def _machine(members: Sequence[Member], placements: Sequence[Placement], machine: int) -> MachineParts:
    here = [place for place, member in enumerate(members) if member.machine == machine]
    return host_of([members[place] for place in here], [placements[place] for place in here])


def _notes(job: Job, ranks: Sequence[Plan]) -> tuple[str, ...]:
    notes = list(dict.fromkeys(note for plan in ranks for note in plan.notes))
    if any(plan.traffic.sent for plan in ranks):
        assumed = ", as is assumed for cards without NVLink" if job.link_bytes_per_s == LINK_BYTES_PER_S else ""
        notes.append(f"ranks of a stage exchange heads at {job.link_bytes_per_s / GIGA:g} GB/s each way{assumed}")
    most = max(len(plan.share.steps) for plan in ranks)
    if job.wave and job.wave > most:
        notes.append(f"a stage has {most} steps at the most: no more share a pass, though {job.wave} were asked for")
    return tuple(notes)


def _refusal(members: Sequence[Member], short: Shortfall, ram_bytes: Sequence[int]) -> DoesNotFit:
    pairs = zip(members, short.placements, strict=True)
    ranks = [describe(m.job, placement, m.budgets, m.card) for m, placement in pairs]

    def fits(changed: Job) -> bool:
        jobs = [dataclasses.replace(m.job, work=changed.work, kv=changed.kv) for m in members]
        smaller = [dataclasses.replace(m, job=job) for m, job in zip(members, jobs, strict=True)]
        return not isinstance(settle(smaller, ram_bytes), Shortfall)

    if short.rank is not None:
        plan = ranks[short.rank]
        where, needed, there = f" on {plan.share.role.name}", plan.peak_vram_bytes, plan.vram_budget_bytes
        stage = max(plan.stage_peaks, key=lambda name: plan.stage_peaks[name])
        what = f"of device memory needed at the least ({stage})"
    else:
        machine = short.machine or 0
        plan = max(ranks, key=lambda plan: (members[plan.share.role.rank].machine == machine, plan.peak_host_bytes))
        needed, there = _machine(members, short.placements, machine).peak, ram_bytes[machine]
        here = [str(m.job.rank) for m in members if m.machine == machine]
        where = f" on machine {machine}"
        what = f"of host memory needed at the least by its ranks {', '.join(here)} together"
        if len(members) == 1:
            what = f"of host memory needed at the least beside {gib(plan.vram_budget_bytes)} of device memory"
    where = "" if len(members) == 1 else where
    said = f"{words_of(members[0].job.work)} does not fit{where}: {gib(needed)} {what}, {gib(there)} there"
    host = [_machine(members, short.placements, machine) for machine in range(len(ram_bytes))]
    return DoesNotFit(f"{said}; {advice(members[0].job, fits)}", plan, ranks, host)
