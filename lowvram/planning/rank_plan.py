"""Plan of one rank: what is predicted of its placement, what is kept free on its card beside, and what is said where no
placement fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from lowvram.byte_sizes import gib
from lowvram.offload.placement import Placement
from lowvram.planning.block_tasks import Task
from lowvram.planning.cards import Card
from lowvram.planning.library_memory import FLAT_BYTES, NCCL_FLAT_BYTES, SLACK_BYTES
from lowvram.planning.memory import (
    DeviceParts,
    HostParts,
    MachineParts,
    ReferenceParts,
    host_parts,
    later_text,
    reference_parts,
)
from lowvram.planning.memory_costs import MIB, Operations, ring_costs, sink_bytes, step_operations
from lowvram.planning.model_sizes import ModelSizes
from lowvram.planning.operation_rates import Bound
from lowvram.planning.rank_layout import Share
from lowvram.planning.search import Job, least_placement
from lowvram.planning.timing import Limits, Seconds, Traffic, limits, range_words, traffic
from lowvram.planning.workload import Workload
from lowvram_kernels.errors import ConfigError, OutOfMemoryError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reserve:
    """Bytes. ``outside``: libraries and kernels; ``nccl``: the group of a rank that exchanges, 0 where there is none or
    where it has taken its part already; ``slack``: small tensors that nobody counts."""

    outside: int
    outside_measured: bool
    nccl: int = 0
    nccl_measured: bool = False
    slack: int = SLACK_BYTES

    @property
    def total(self) -> int:
        return self.outside + self.nccl + self.slack


def reserve_of(card: Card, work: Workload, share: Share, *, grouped: bool) -> Reserve:
    """Of a card: what was measured there, or flat values; and what NCCL takes of a rank that exchanges, unless ranks
    are ``grouped`` already, which is seen in what is free."""
    found = Reserve(outside=FLAT_BYTES, outside_measured=False)
    if card.outside is not None:
        found = Reserve(outside=card.outside.reserved(work.pixels), outside_measured=True)
    if grouped or not share.exchanges:
        return found
    nccl = dict(card.nccl).get(share.parts)
    return dataclasses.replace(found, nccl=NCCL_FLAT_BYTES if nccl is None else nccl, nccl_measured=nccl is not None)


KV_NAMES = {"int8": "int8", "bf16": "plain"}
_SMALLER_SIZES = ("1280*720", "832*480", "720*400", "704*384", "512*320", "384*256", "256*192")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A placement and what it is predicted to take. Bytes, and seconds of one block in the steady state.

    ``operations`` are those of one step of a block; ``tasks`` is all that ``seconds`` are made of. ``stage_peaks`` are
    device bytes without ``reserve_bytes``; ``peak_vram_bytes`` is the highest with it. ``kv_ring_bytes`` and
    ``sink_bytes`` are keys and values alone, their scales and means apart, wherever they lie.

    Of one rank of several, everything is what its ``share`` takes, but for ``reference`` and ``limits``, which are of a
    whole run; the weights in ``host`` lie there once for all ranks of a machine that stream them, and
    ``text_encoder_device`` is "" on a rank that has none. ``resident``: weights stay for a next video.
    """

    placement: Placement
    workload: Workload
    share: Share
    card: Card
    precision: str
    layers: int
    operations: Operations
    fits: bool
    vram_budget_bytes: int
    ram_budget_bytes: int
    reserve: Reserve
    text_encoder_device: str
    stage_peaks: dict[str, int]
    device: DeviceParts
    host: HostParts
    reference: ReferenceParts
    weight_bytes: int
    kv_ring_bytes: int
    kv_scale_bytes: int
    sink_bytes: int
    sink_scale_bytes: int
    traffic: Traffic
    tasks: tuple[Task, ...]
    seconds: Seconds
    limits: Limits
    notes: tuple[str, ...] = ()
    resident: bool = False

    @property
    def reserve_bytes(self) -> int:
        return self.reserve.total

    @property
    def peak_vram_bytes(self) -> int:
        return max(self.stage_peaks.values()) + self.reserve_bytes

    @property
    def peak_host_bytes(self) -> int:
        return self.host.peak

    @property
    def pcie_bytes_per_block(self) -> int:
        """Both ways."""
        return self.traffic.total

    @property
    def seconds_per_block(self) -> float:
        return self.seconds.block

    def seconds_at(self, bound: Bound) -> Seconds:
        """``seconds`` are those that are expected; "low" and "high" ones those of the best and the poorest rates."""
        return Seconds.of(self.tasks, bound)

    @property
    def seconds_range(self) -> tuple[float, float]:
        """Of a block, low and high."""
        return self.seconds_at("low").block, self.seconds_at("high").block

    @property
    def limited_by(self) -> str:
        """What takes longer; see ``Seconds``."""
        return self.seconds.limited_by

    @property
    def rings(self) -> int:
        """KV rings of this rank, one a step and layer."""
        return self.layers * len(self.share.steps)

    def summary(self) -> str:
        """The plan in a line."""
        streamed = len(self.placement.streamed_layers)
        dit = (
            f"{streamed} of {self.layers} layers and {len(self.placement.host_rings)} of {self.rings} KV rings "
            f"({self.placement.kv}) come from the host, {self.placement.wave} steps share a pass; "
        )
        return (
            f"plan: {dit if self.share.denoises else ''}predicted are "
            f"{gib(self.peak_vram_bytes)} of {gib(self.vram_budget_bytes)} on the device, {gib(self.peak_host_bytes)} "
            f"of {gib(self.ram_budget_bytes)} on the host and {self.seconds_per_block:.2f} s a block "
            f"({range_words(*self.seconds_range)})"
        )


class DoesNotFit(OutOfMemoryError):
    """No placement fits; ``plan`` is the one that comes nearest. For several ranks it is that of the rank that does not
    fit, ``ranks`` are those of all of them, and ``host`` is what they would take of each machine."""

    def __init__(self, message: str, plan: Plan, ranks: Sequence[Plan] = (), host: Sequence[MachineParts] = ()):
        super().__init__(message)
        self.plan, self.ranks, self.host = plan, tuple(ranks), tuple(host)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgets:
    """Bytes of device and host, and of the device what is kept free."""

    vram: int
    ram: int
    reserve: Reserve

    @property
    def usable(self) -> int:
        return self.vram - self.reserve.total


def kv_scheme(kv: str, sizes: ModelSizes) -> str:
    """How rings are kept where a user says ``kv``, as ``Placement`` has it."""
    if kv == "auto":
        return "int8" if sizes.quantized else "plain"
    return KV_NAMES[kv]


def wave_of(wave: str | int, steps: int) -> int | None:
    """None for any."""
    if wave == "auto":
        return None
    if not isinstance(wave, int) or not 1 <= wave <= steps:
        raise ConfigError(f"--wave is {wave!r}; expected auto, or 1 to the number of steps, {steps}")
    return wave


def place_text_encoder(job: Job, usable_bytes: int) -> Job:
    """On the host where that is asked for, or where it does not fit on the device: it runs once a video."""
    needed = job.stage_peaks(least_placement(job)).get("encode_text", 0)
    return dataclasses.replace(job, text_device="cpu") if job.options.t5_cpu or needed > usable_bytes else job


def describe(job: Job, placement: Placement, budgets: Budgets, card: Card) -> Plan:
    """Everything that is predicted of a placement."""
    sizes, work, share = job.sizes, job.work, job.share
    parts = job.device_parts(placement)
    resident = job.options.resident
    host = host_parts(sizes, work, placement, job.text_device, share, resident=resident)
    ring = ring_costs(sizes.config, work, placement.kv, share)
    sink = sink_bytes(sizes.config, work, placement.kv, share)
    peaks = job.stage_peaks(placement)
    later = later_text(sizes, work, parts) if resident and share.media else 0
    later_on_host = resident and (job.text_device == "cpu" or later > budgets.usable)
    if later and not later_on_host:
        peaks["encode_text"] = later
    tasks = job.tasks(placement, card.rates)
    return Plan(
        placement=dataclasses.replace(
            placement, text_on_host=job.text_device == "cpu", later_text_on_host=later_on_host
        ),
        workload=work,
        share=share,
        card=card,
        precision=sizes.precision,
        layers=sizes.config.num_layers,
        operations=step_operations(sizes.config, work, share),
        fits=max(peaks.values()) <= budgets.usable and host.peak <= budgets.ram,
        vram_budget_bytes=budgets.vram,
        ram_budget_bytes=budgets.ram,
        reserve=budgets.reserve,
        text_encoder_device=job.text_device if share.media else "",
        stage_peaks=peaks,
        device=parts,
        host=host,
        reference=reference_parts(sizes, work),
        weight_bytes=sizes.weight_bytes if share.denoises else 0,
        kv_ring_bytes=ring.cells * ring.payload,
        kv_scale_bytes=ring.cells * ring.scales,
        sink_bytes=sink.payload,
        sink_scale_bytes=sink.scales,
        traffic=traffic(sizes, work, placement, share),
        tasks=tuple(tasks),
        seconds=Seconds.of(tasks),
        limits=limits(sizes, work, card.rates),
        notes=(*_notes(job, card), *_vae_note(job, placement), *_later_note(job, later_on_host=later_on_host)),
        resident=resident,
    )


def _notes(job: Job, card: Card) -> tuple[str, ...]:
    source = "rates measured on this card" if card.rates.measured else "data-sheet rates"
    said = f"seconds are predicted from {source} and the shares of them in the table of operations, not measured"
    notes = [said, *card.notes]
    if job.text_device == "cpu":
        reason = "is to run on the host" if job.options.t5_cpu else "does not fit on the device: it runs on the host"
        notes.append(f"the text encoder {reason}, once a video")
    if "fp8" in job.sizes.schemes and not card.has_fp8:
        widened = "bf16" if job.work.dtype is torch.bfloat16 else "float32"
        notes.append(f"{card.name} has no FP8 units: fp8 weights are widened to {widened} at use; int8 is faster there")
    if job.sizes.precision == "fp32":
        notes.append("weights stored in float32 cross PCIe at twice the bytes of bf16; convert with --precision bf16")
    if job.work.dtype is torch.float32:
        notes.append(
            "what is not 8-bit is computed in float32, at twice the bytes of bfloat16 and without tensor cores; "
            "bfloat16 is the default on GPUs"
        )
    return tuple(notes)


def _later_note(job: Job, *, later_on_host: bool) -> list[str]:
    """Where the text encoder computes beside weights that stay."""
    if not job.options.resident or job.text_device == "cpu":
        return []
    where = "on the host: beside them there is no room for it" if later_on_host else "beside them, on the device"
    return [f"weights stay for the next video; the text encoder of a new prompt runs {where}"]


def _vae_note(job: Job, placement: Placement) -> list[str]:
    """How the VAE's weights are used, where they are in 8 bit."""
    if not job.share.media or not job.sizes.vae_decoder:
        return []
    mib = sum(job.sizes.vae_decoder) * job.work.value_bytes / MIB
    nbytes = f"{mib:.3g} MiB"  # a small one has no hundredth of a GiB
    if placement.wide_vae:
        return [f"the VAE's 8-bit decoder is widened once, as it is loaded, to {nbytes}"]
    return [f"the VAE's 8-bit decoder is widened at every use: there is no room to keep its {nbytes} instead"]


def words_of(work: Workload) -> str:
    """What is to be made, for messages."""
    height, width = work.size_px
    return f"{width}*{height} with {work.infer_frames} frames a clip and {work.sample_steps} steps"


def advice(job: Job, fits: Callable[[Job], bool]) -> str:
    """The first change, from harmless to not, with which everything ``fits``."""
    kv = "" if job.kv == "int8" else "--kv int8 "
    changes = [(kv, job.work)] if kv else []
    for size in _SMALLER_SIZES:
        work = job.work.at_size(size)
        if work.pixels < job.work.pixels:
            changes.append((f'{kv}--size "{size}"', work))
    for options, work in changes:
        if fits(dataclasses.replace(job, work=work, kv="int8")):
            return f"{options.strip()} would fit"
    return "no smaller size would fit either: take a card or a host with more memory"
