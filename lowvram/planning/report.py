"""Report of a plan: for people, as tables, and for programs, as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from lowvram.byte_sizes import gib
from lowvram.planning.breakdown import breakdown_table, rows_of_tasks
from lowvram.planning.rank_plan import Plan, Reserve
from lowvram.planning.timing import range_words

_PART_NAMES = {
    "shared_weights": "embeddings, head, audio encoder of the DiT",
    "resident_layers": "resident layers",
    "weight_slots": "staging slots of streamed layers",
    "rings": "resident KV rings",
    "ring_slots": "staging slots of KV rings",
    "sink": "attention sink",
    "rollout_inputs": "blocks under way",
    "graphs": "CUDA graphs",
    "vae": "VAE",
    "decoder_cache": "VAE decoder's cache",
}
_REFERENCE_NAMES = {
    "dit": "DiT, bf16",
    "kv_rings": "KV rings, bf16",
    "sink": "attention sink, bf16",
    "text_encoder": "text encoder, bf16",
    "audio_encoder": "audio encoder, float32",
    "vae": "VAE",
    "workspace": "workspace",
}


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything of a plan in numbers, strings and lists; bytes and seconds as in ``Plan``."""
    placement = plan.placement
    return {
        "fits": plan.fits,
        "vram_budget_bytes": plan.vram_budget_bytes,
        "ram_budget_bytes": plan.ram_budget_bytes,
        "peak_vram_bytes": plan.peak_vram_bytes,
        "peak_host_bytes": plan.peak_host_bytes,
        "reserve_bytes": plan.reserve_bytes,
        "reserve": dataclasses.asdict(plan.reserve),
        "weight_bytes": plan.weight_bytes,
        "kv_ring_bytes": plan.kv_ring_bytes,
        "kv_scale_bytes": plan.kv_scale_bytes,
        "sink_bytes": plan.sink_bytes,
        "sink_scale_bytes": plan.sink_scale_bytes,
        "pcie_bytes_per_block": plan.pcie_bytes_per_block,
        "pcie_h2d_bytes_per_block": plan.traffic.h2d,
        "pcie_d2h_bytes_per_block": plan.traffic.d2h,
        "seconds_per_block": plan.seconds_per_block,
        "seconds": dataclasses.asdict(plan.seconds),
        "seconds_range": list(plan.seconds_range),
        "breakdown": [row.to_json() for row in rows_of_tasks(plan.tasks)],
        "limited_by": plan.limited_by,
        "limits": dataclasses.asdict(plan.limits),
        "tflop_per_step": {
            "linear": plan.operations.linear / 1e12,
            "attention": plan.operations.attention / 1e12,
        },
        "stage_peak_bytes": plan.stage_peaks,
        "device_bytes": dataclasses.asdict(plan.device),
        "host_bytes": dataclasses.asdict(plan.host),
        "reference_bytes": dataclasses.asdict(plan.reference) | {"total": plan.reference.total},
        "placement": {
            "streamed_layers": list(placement.streamed_layers),
            "host_rings": [list(cell) for cell in placement.host_rings],
            "weight_slots": placement.weight_slots,
            "ring_slots": placement.ring_slots,
            "kv": placement.kv,
            "wave": placement.wave,
            "wide_vae": placement.wide_vae,
        },
        "text_encoder_device": plan.text_encoder_device,
        "precision": plan.precision,
        "dtype": plan.workload.dtype_name,
        "gpu": plan.card.name,
        "latent_size": list(plan.workload.latent_size),
        "tokens_per_block": plan.workload.block_tokens,
        "infer_frames": plan.workload.infer_frames,
        "sample_steps": plan.workload.sample_steps,
        "notes": list(plan.notes),
    }


class Simulated(Protocol):
    """What a dry run of a plan took, in bytes."""

    @property
    def stages(self) -> dict[str, int]: ...

    @property
    def peak_reserved(self) -> int: ...

    @property
    def kernels(self) -> str: ...


def print_plan(plan: Plan, console: Console, simulated: Simulated | None = None) -> None:
    """Print what is where, what it takes, how fast it will be, and what the published way would need."""
    tables = (_placement(plan), _device(plan), _stages(plan, simulated), _speed(plan), _seconds(plan), _reference(plan))
    for table in tables:
        console.print(table)
    if simulated is not None:
        console.print(kernels_line([simulated]))
    for note in plan.notes:
        console.print(f"Note: {note}.")


def kernels_line(simulated: Sequence[Simulated]) -> str:
    """Whose temporaries dry runs counted."""
    return f"Simulated with the kernels of {', '.join(dict.fromkeys(run.kernels for run in simulated))}."


def empty_table(title: str, *columns: str) -> Table:
    """An empty one; numbers are on the right."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _placement(plan: Plan) -> Table:
    height, width = plan.workload.size_px
    title = f"{width}*{height}, {plan.workload.infer_frames} frames a clip, {plan.workload.sample_steps} steps"
    table = empty_table(f"{title}: {plan.workload.block_tokens} tokens a block", "", "on the device", "from the host")
    layers, streamed = plan.layers, len(plan.placement.streamed_layers)
    rings, hosted = layers * plan.workload.sample_steps, len(plan.placement.host_rings)
    dtype = plan.workload.dtype_name
    kv = {"int8": "int8", "plain": "bf16" if dtype == "bfloat16" else dtype}[plan.placement.kv]
    table.add_row(f"layers, {plan.precision} ({gib(plan.weight_bytes)} in all)", str(layers - streamed), str(streamed))
    rings_bytes = plan.kv_ring_bytes + plan.kv_scale_bytes
    table.add_row(f"KV rings, {kv} ({gib(rings_bytes)} in all)", str(rings - hosted), str(hosted))
    table.add_row(f"sink, {kv}", gib(plan.sink_bytes + plan.sink_scale_bytes), "")
    table.add_row("text encoder, while it works", *(("yes", "") if plan.text_encoder_device == "cuda" else ("", "yes")))
    table.add_row("steps that share a pass over the layers", str(plan.placement.wave), "")
    table.add_row("computed in, what is not 8-bit", dtype, "")
    return table


def _device(plan: Plan) -> Table:
    table = empty_table("Device memory during the rollout", "", "bytes")
    for name, nbytes in dataclasses.asdict(plan.device).items():
        if nbytes:
            table.add_row(_PART_NAMES[name], gib(nbytes))
    table.add_row("together", gib(plan.device.total), style="bold")
    return table


def _stages(plan: Plan, simulated: Simulated | None) -> Table:
    found = {name: gib(nbytes) for name, nbytes in simulated.stages.items()} if simulated else {}
    table = empty_table("Peaks", "", "predicted", "simulated", "budget")
    for stage, nbytes in plan.stage_peaks.items():
        table.add_row(stage, gib(nbytes), found.get(stage, ""), "")
    for said, nbytes in reserve_rows(plan.reserve):
        table.add_row(said, gib(nbytes), "", "")
    peak, budget = gib(plan.peak_vram_bytes), gib(plan.vram_budget_bytes)
    reserved = gib(simulated.peak_reserved) if simulated else ""
    table.add_row("device, highest with reserve", peak, reserved, budget, style="bold")
    if plan.host.voice_encoder:
        table.add_row("host, for a long voice", gib(plan.host.voice_encoder), "", "")
    table.add_row("host", gib(plan.peak_host_bytes), "", gib(plan.ram_budget_bytes), style="bold")
    return table


def reserve_rows(reserve: Reserve) -> list[tuple[str, int]]:
    """What is kept free: names that say whether it was measured on the card, and bytes."""

    def known(measured: bool) -> str:
        return "measured on this card" if measured else "assumed"

    rows = [(f"reserve: libraries and kernels, {known(reserve.outside_measured)}", reserve.outside)]
    if reserve.nccl:
        rows.append((f"reserve: NCCL, {known(reserve.nccl_measured)}", reserve.nccl))
    return [*rows, ("reserve: slack", reserve.slack)]


def _speed(plan: Plan) -> Table:
    table = empty_table(f"One block on {plan.card.name}", "", "predicted", "no plan can beat")
    bounds, frames = plan.limits, 4 * plan.workload.frames_per_block
    table.add_row("linear and attention, TFLOP a step", *_tflop(plan))
    arithmetic = f"{bounds.int8_arithmetic_s:.2f} s int8, {bounds.bf16_arithmetic_s:.2f} s bf16"
    table.add_row("arithmetic, passes between", f"{plan.seconds.arithmetic:.2f} s", arithmetic)
    table.add_row("PCIe bytes, in", gib(plan.traffic.h2d), "")
    table.add_row("PCIe bytes, out", gib(plan.traffic.d2h), "")
    table.add_row("PCIe", f"{plan.seconds.pcie:.2f} s", f"{bounds.pcie_once_s:.2f} s for all int8 once")
    table.add_row("host, asking for kernels", f"{plan.seconds.host:.2f} s", "")
    table.add_row("copies that hide behind nothing", f"{plan.seconds.exposed:.2f} s", "")
    table.add_row("decoding", f"{plan.seconds.decode:.2f} s", "")
    low, high = plan.seconds_range
    speed = f"{plan.seconds_per_block:.2f} s ({range_words(low, high)})"
    rate = f"{frames / plan.seconds_per_block:.1f} frames/s ({frames / high:.1f} to {frames / low:.1f})"
    table.add_row("limited by", plan.limited_by, "")
    table.add_row("seconds a block", speed, "", style="bold")
    table.add_row("", rate, "", style="bold")
    return table


def _seconds(plan: Plan) -> Table:
    return breakdown_table(rows_of_tasks(plan.tasks), "Where the seconds of a block go")


def _tflop(plan: Plan) -> tuple[str, str]:
    return f"{plan.operations.linear / 1e12:.0f} + {plan.operations.attention / 1e12:.0f}", ""


def _reference(plan: Plan) -> Table:
    table = empty_table("The published way, everything on the card at once", "", "bytes")
    for name, nbytes in dataclasses.asdict(plan.reference).items():
        table.add_row(_REFERENCE_NAMES[name], gib(nbytes))
    table.add_row("together", gib(plan.reference.total), style="bold")
    return table
