"""Search over all ways to divide weights and rings between device and host that fill a budget, for the fastest."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from lowvram.offload.placement import Placement, PlanOptions
from lowvram.planning.block_tasks import Task
from lowvram.planning.cards import LINK_BYTES_PER_S, Rates
from lowvram.planning.memory import DeviceParts, device_parts, stage_peaks
from lowvram.planning.memory_costs import allocated, ring_costs
from lowvram.planning.model_sizes import ModelSizes
from lowvram.planning.rank_layout import ParallelLayout, Share, share_of
from lowvram.planning.timing import Seconds, block_tasks
from lowvram.planning.workload import Workload

Cell = tuple[int, int]
_ENCODERS = ("encode_text", "encode_audio", "encode_image")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One rank's part of a model and a workload, with ``options`` and what is settled of them: ``kv`` "plain" or
    "int8", ``wave`` None for any, and where the text encoder runs, "cuda" or "cpu".

    ``link_bytes_per_s`` is what it sends other ranks in a second, while it receives as much."""

    sizes: ModelSizes
    work: Workload
    kv: str
    wave: int | None = None
    text_device: str = "cuda"
    options: PlanOptions = dataclasses.field(default_factory=PlanOptions)
    layout: ParallelLayout = dataclasses.field(default_factory=ParallelLayout)
    rank: int = 0
    link_bytes_per_s: float = LINK_BYTES_PER_S

    @functools.cached_property
    def share(self) -> Share:
        return share_of(self.sizes.config, self.work, self.layout, self.rank)

    @property
    def layers(self) -> int:
        return self.sizes.config.num_layers

    @property
    def cells(self) -> int:
        """Rings: one a step that runs here, and layer."""
        return len(self.share.steps) * self.layers

    def placement(self, streamed: int, hosted: int, wave: int) -> Placement:
        """So many layers streamed and rings on the host, each spread evenly."""
        return Placement(
            streamed_layers=spread(streamed, self.layers),
            host_rings=spread_rings(hosted, self.share.steps, self.layers),
            kv=self.kv,
            wave=wave,
        )

    def stage_peaks(self, placement: Placement) -> dict[str, int]:
        """Device bytes of each stage, without the reserve."""
        parts = self.device_parts(placement)
        resident = self.options.resident
        return stage_peaks(self.sizes, self.work, placement, parts, self.text_device, self.share, resident=resident)

    def device_parts(self, placement: Placement) -> DeviceParts:
        return device_parts(self.sizes, self.work, placement, self.share, cuda_graphs=bool(self.options.cuda_graphs))

    def peak(self, placement: Placement) -> int:
        return max(self.stage_peaks(placement).values())

    def seconds(self, placement: Placement, rates: Rates) -> Seconds:
        """Of a block, in the steady state."""
        return Seconds.of(self.tasks(placement, rates))

    def tasks(self, placement: Placement, rates: Rates) -> list[Task]:
        """Of a block, in the steady state."""
        graphs = bool(self.options.cuda_graphs)
        return block_tasks(
            self.sizes, self.work, placement, rates, self.share, self.link_bytes_per_s, cuda_graphs=graphs
        )


def spread(count: int, total: int) -> tuple[int, ...]:
    """``count`` of the indices 0..total - 1, as evenly as can be: 3 of 6 are (1, 3, 5)."""
    return tuple((2 * i + 1) * total // (2 * count) for i in range(count))


@functools.lru_cache(maxsize=256)
def spread_rings(count: int, steps: range, layers: int) -> tuple[Cell, ...]:
    """``count`` of the (step, layer) rings, spread evenly over layers and steps.

    Alone, a step's pass meets the rings of that step only; in a wave, a layer meets those of all steps: both have to
    be even. So they are counted out along the layers, and the steps take turns.
    """
    return tuple(sorted((steps[i % len(steps)], (2 * i + 1) * layers // (2 * count)) for i in range(count)))


def candidates(job: Job, budget_bytes: int) -> Iterator[Placement]:
    """For each wave and each number of streamed layers: as many rings on the device as fit in ``budget_bytes``.

    Nothing comes of a combination that does not fit even with all rings on the host. A rank that does not denoise has
    nothing to divide: it fits or not.
    """
    if not job.share.denoises:
        placement = least_placement(job)
        yield from [placement] if job.peak(placement) <= budget_bytes else []
        return
    for wave in [job.wave] if job.wave else range(1, len(job.share.steps) + 1):
        for streamed in [job.layers] if job.options.offload_model else range(job.layers + 1):
            hosted = fewest_host_rings(job, streamed, wave, budget_bytes)
            if hosted is not None:
                yield job.placement(streamed, hosted, wave)


def fewest_host_rings(job: Job, streamed: int, wave: int, budget_bytes: int) -> int | None:
    """How many rings have to lie on the host; None where nothing helps."""
    if job.options.offload_kv_cache:
        return job.cells if job.peak(job.placement(streamed, job.cells, wave)) <= budget_bytes else None
    peaks = job.stage_peaks(job.placement(streamed, 0, wave))
    if max(peaks.get(stage, 0) for stage in _ENCODERS) > budget_bytes:
        return None
    beyond = max(peaks.values()) - budget_bytes
    if beyond <= 0:
        return 0
    # Each ring that goes frees its bytes, but the first of them needs staging slots.
    cell = allocated(ring_costs(job.sizes.config, job.work, job.kv, job.share).cell)
    hosted = Placement().ring_slots + -(-beyond // cell)
    return hosted if hosted <= job.cells else None


def least_placement(job: Job) -> Placement:
    """The placement that takes the least of the device."""
    if not job.share.denoises:
        return Placement(kv=job.kv)
    # Staging takes room too: what has few layers, or few rings, may be smaller without it.
    counts = itertools.product((job.layers, 0), (job.cells, 0))
    options = [
        job.placement(streamed, hosted, job.wave or 1)
        for streamed, hosted in counts
        if (streamed or not job.options.offload_model) and (hosted or not job.options.offload_kv_cache)
    ]
    return min(options, key=job.peak)


def fastest(job: Job, rates: Rates, placements: list[Placement]) -> Placement:
    """The one with the fewest predicted seconds a block; of equal ones that with the least to hide, then the smaller
    wave, which shows its first frames sooner."""

    def rank(placement: Placement) -> tuple[float, float, int]:
        seconds = job.seconds(placement, rates)
        return seconds.block, seconds.pcie, placement.wave

    return min(placements, key=rank)
