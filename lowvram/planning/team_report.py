"""A plan for several ranks for people, as tables, and for programs, as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lowvram.byte_sizes import gib, gib_number
from lowvram.planning.block_tasks import Task
from lowvram.planning.breakdown import breakdown_table, rows_of_tasks
from lowvram.planning.layout_choice import Alternative, Compared
from lowvram.planning.planner import TeamPlan
from lowvram.planning.rank_plan import Plan
from lowvram.planning.report import Simulated, empty_table, kernels_line, reserve_rows, to_json
from lowvram.planning.timing import range_words

_STAGES = ("encode_text", "encode_audio", "encode_image", "load_dit", "prefill_sink", "denoise", "decode")
_HOST_NAMES = {
    "base": "processes",
    "pinned_weights": "streamed layers, once for all ranks",
    "pinned_rings": "KV rings",
    "pinned_cache": "copy of the VAE decoder's cache",
    "text_encoder": "text encoder, before anything else is there",
    "voice_encoder": "audio encoder, for a long voice",
}


def compared_to_json(compared: Compared) -> dict[str, Any]:
    """Everything in numbers, strings and lists. Without a plan that fits, ``refused`` says why."""
    others = {"alternatives": [_alternative(alternative) for alternative in compared.alternatives]}
    if compared.team is not None:
        return team_to_json(compared.team) | others
    assert compared.refusal is not None
    ranks = [_rank(plan) for plan in compared.refusal.ranks]
    return {"fits": False, "refused": str(compared.refusal), "ranks": ranks} | others


def team_to_json(team: TeamPlan) -> dict[str, Any]:
    return {
        "fits": True,
        "gpus": len(team.ranks),
        "layout": dataclasses.asdict(team.layout) | {"stages": team.layout.stages},
        "seconds_per_block": team.seconds_per_block,
        "seconds_range": list(team.seconds_range),
        "frames_per_second": team.frames_per_s,
        "first_block_seconds": team.first_block_s,
        "limited_by": team.limited_by,
        "seconds": {name: dataclasses.asdict(seconds) for name, seconds in team.parts.items()},
        "ranks": [_rank(plan) | {"machine": machine} for plan, machine in zip(team.ranks, team.machines, strict=True)],
        "machines": [
            {"peak_host_bytes": parts.peak, "ram_budget_bytes": there, "host_bytes": dataclasses.asdict(parts)}
            for parts, there in zip(team.host, team.ram_bytes, strict=True)
        ],
        "notes": list(team.notes),
    }


def _rank(plan: Plan) -> dict[str, Any]:
    share = plan.share
    part = {
        "role": share.role.name,
        "steps": list(share.steps),
        "heads": share.heads,
        "tokens_per_block": share.block_tokens,
        "sent_bytes_per_block": plan.traffic.sent,
    }
    of_the_run = ("reference_bytes", "limits", "notes", "latent_size", "infer_frames", "sample_steps")
    return {name: value for name, value in to_json(plan).items() if name not in of_the_run} | part


def _alternative(alternative: Alternative) -> dict[str, Any]:
    layout, team = alternative.layout, alternative.plan
    said: dict[str, Any] = {"refused": str(alternative.refusal)}
    if team is not None:
        said = {
            "seconds_per_block": team.seconds_per_block,
            "frames_per_second": team.frames_per_s,
            "first_block_seconds": team.first_block_s,
            "limited_by": team.limited_by,
        }
    return {"layout": dataclasses.asdict(layout) | {"stages": layout.stages}, "fits": team is not None} | said


def print_team(compared: Compared, console: Console, simulated: Sequence[Simulated] = ()) -> None:
    """Print what each rank does and takes, what the host holds, how fast it will be, and what else there is;
    ``simulated`` are dry runs of all ranks, if any.

    Raises:
        DoesNotFit: nothing that was allowed fits.
    """
    if compared.team is None:
        assert compared.refusal is not None
        raise compared.refusal
    team = compared.team
    for each in (
        _ranks(team),
        _seconds(team),
        *_breakdowns(team),
        _peaks(team, simulated),
        *_hosts(team),
        _others(compared),
    ):
        console.print(each)
    if simulated:
        console.print(kernels_line(simulated))
    for alternative in compared.alternatives:
        if alternative.refusal is not None:
            console.print(f"{alternative.layout.words()}: {alternative.refusal}.")
    planned = [alternative.plan for alternative in compared.alternatives if alternative.plan is not None]
    for note in dict.fromkeys(note for plan in (team, *planned) for note in plan.notes):
        console.print(f"Note: {note}.")


def _ranks(team: TeamPlan) -> Table:
    height, width = team.workload.size_px
    title = f"{width}*{height}, {team.workload.infer_frames} frames a clip, {team.workload.sample_steps} steps"
    columns = ("device", "budget", "layers streamed", "rings on host", "heads", "steps", "wave")
    found = empty_table(f"{title}, {len(team.ranks)} GPUs: {team.layout.words()}", "", *columns)
    for plan in team.ranks:
        dit = (
            f"{len(plan.placement.streamed_layers)} of {plan.layers}",
            f"{len(plan.placement.host_rings)} of {plan.rings}",
            str(plan.share.heads),
            str(len(plan.share.steps)),
            str(plan.placement.wave),
        )
        cells = dit if plan.share.denoises else ("",) * len(dit)
        found.add_row(plan.share.role.name, gib(plan.peak_vram_bytes), gib(plan.vram_budget_bytes), *cells)
    return found


def _seconds(team: TeamPlan) -> Table:
    found = empty_table(
        "Seconds a block", "", "arithmetic", "exchange", "PCIe", "host", "exposed", "decode", "together"
    )
    for plan in team.ranks:
        seconds = plan.seconds
        beside = (seconds.pcie, seconds.host, seconds.exposed, seconds.decode)
        each = (seconds.arithmetic, seconds.exchange, *beside, seconds.block)
        found.add_row(
            f"{plan.share.role.name} on {plan.card.name}", *(f"{value:.2f}" if value else "" for value in each)
        )
    said = f"{team.frames_per_s:.1f} frames/s, first after {team.first_block_s:.2f} s"
    ranged = f"{team.limited_by}; {range_words(*team.seconds_range)}"
    found.caption = f"{team.seconds_per_block:.2f} s a block ({ranged}), {said}"
    return found


def _breakdowns(team: TeamPlan) -> list[Table]:
    """Of each stage's slowest rank, and of the VAE's own; of stages that are alike the first."""
    tables: list[Table] = []
    seen: dict[str, tuple[Task, ...]] = {}
    for name, plan in team.slowest_ranks.items():
        if plan.tasks in seen.values():
            continue
        seen[name] = plan.tasks
        alike = [other for other, same in team.slowest_ranks.items() if same.tasks == plan.tasks]
        title = f"Where the seconds of a block go: {', '.join(alike)}"
        tables.append(breakdown_table(rows_of_tasks(plan.tasks), title))
    return tables


def _peaks(team: TeamPlan, simulated: Sequence[Simulated]) -> Table:
    found = empty_table("Peaks and the reserve beside them, GiB", "", *_STAGES, "reserve")
    for plan in team.ranks:
        rank = plan.share.role.rank
        found.add_row(str(rank), *_in_gib(plan.stage_peaks), gib_number(plan.reserve_bytes))
        if simulated:
            found.add_row(f"{rank}, simulated", *_in_gib(simulated[rank].stages))
    reserves = dict.fromkeys(plan.reserve for plan in team.ranks)
    found.caption = "\n".join("; ".join(f"{said} {gib(n)}" for said, n in reserve_rows(each)) for each in reserves)
    return found


def _in_gib(stages: dict[str, int]) -> list[str]:
    return [gib_number(stages[name]) if name in stages else "" for name in _STAGES]


def _hosts(team: TeamPlan) -> list[Table]:
    tables = []
    for index, (parts, there) in enumerate(zip(team.host, team.ram_bytes, strict=True)):
        found = empty_table(
            "Host memory" + (f" of machine {index}" if len(team.host) > 1 else ""), "", "bytes", "budget"
        )
        for name, said in _HOST_NAMES.items():
            if nbytes := getattr(parts, name):
                found.add_row(said, gib(nbytes), "")
        found.add_row("highest", gib(parts.peak), gib(there), style="bold")
        tables.append(found)
    return tables


def _others(compared: Compared) -> Table:
    found = empty_table("All layouts", "", "seconds a block", "frames/s", "first frames", "limited by")
    for alternative in compared.alternatives:
        team = alternative.plan
        if team is None:
            found.add_row(alternative.layout.words(), "does not fit", "", "", "")
            continue
        chosen = compared.team is not None and team.layout == compared.team.layout
        cells = (f"{team.seconds_per_block:.2f}", f"{team.frames_per_s:.1f}", f"{team.first_block_s:.2f} s")
        found.add_row(alternative.layout.words(), *cells, team.limited_by, style="bold" if chosen else None)
    return found
