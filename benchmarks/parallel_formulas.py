"""What ``parallel.py`` expects every rank to send and to hold, from shapes alone; and that of the published 14B."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lowvram.loading.weights import build_dit
from lowvram.offload.placement import MemoryOptions, Placement, placement_on_cpu
from lowvram.planning import CARDS, Workload, plan_team
from lowvram.planning.members import Machines
from lowvram.planning.memory_costs import BFLOAT16_BYTES, FLOAT32_BYTES, step_exchange
from lowvram.planning.model_sizes import ModelSizes, model_sizes
from lowvram.planning.rank_layout import ParallelLayout, share_of
from lowvram_models.constants import LATENT_CHANNELS
from lowvram_quantize.format import Artifact
from lowvram_quantize.shape_artifact import write_shape_artifact

RANKS = (2, 3, 4)
CARD, VRAM_GIB, RAM_GIB, SIZE = "rtx4090", 22.15, 64, "704*384"
Shapes = Sequence[tuple[int, ...]]


def layouts() -> Iterator[tuple[str, ParallelLayout]]:
    """Names and layouts that are compared with FSDP of as many ranks for the DiT."""
    for vae_rank in (False, True):
        for kind in ("ulysses", "stages"):
            for ranks in RANKS:
                size = ranks if kind == "ulysses" else 1
                name = f"{kind}-{ranks}{'-vae' if vae_rank else ''}"
                yield name, ParallelLayout(num_gpus_dit=ranks, ulysses_size=size, vae_rank=vae_rank)


def sent(sizes: ModelSizes, work: Workload, layout: ParallelLayout, rank: int) -> dict[str, int]:
    """Bytes that a rank sends for one block of the steady state: nothing of a parameter."""
    share = share_of(sizes.config, work, layout, rank)
    exchange = len(share.steps) * step_exchange(sizes.config, work, share).sent
    return {"exchange": exchange, "latents": _letters(work, layout, rank), "parameters": 0}


def _letters(work: Workload, layout: ParallelLayout, rank: int) -> int:
    """Latents to the next stage, or to the VAE's rank."""
    role = layout.role(rank)
    last = role.stage == layout.stages - 1
    sends = role.denoises and (not last or (layout.vae_rank and role.index == 0))
    return sends * LATENT_CHANNELS * work.frames_per_block * math.prod(work.latent_size) * FLOAT32_BYTES


def held(sizes: ModelSizes, placement: Placement, layout: ParallelLayout, rank: int) -> int:
    """Bytes of the DiT's parameters on the device: shared ones, resident layers, staging slots."""
    if not layout.role(rank).denoises:
        return 0
    streamed = set(placement.streamed_layers)
    resident = sum(nbytes for layer, nbytes in enumerate(sizes.layer_bytes) if layer not in streamed)
    slots = placement.weight_slots * max((sizes.layer_bytes[layer] for layer in streamed), default=0)
    return sizes.shared.nbytes + resident + slots


class Fsdp:
    """FSDP of one model: each of the DiT's blocks is a unit, all else the root's, which stays gathered once it is."""

    def __init__(self, blocks: Sequence[Shapes], root: Shapes, ranks: int):
        self._ranks = ranks
        self._blocks, self._root = [self._shard(block) for block in blocks], self._shard(root)

    @classmethod
    def of(cls, artifact: Artifact, ranks: int) -> Fsdp:
        dit = build_dit(artifact.component("dit"))
        root = [tuple(p.shape) for name, p in dit.named_parameters() if not name.startswith("blocks.")]
        return cls([[tuple(p.shape) for p in block.parameters()] for block in dit.blocks], root, ranks)

    def sent(self, steps: int) -> int:
        """In every step each block's shard goes to all other ranks."""
        return steps * (self._ranks - 1) * sum(self._blocks)

    def held(self) -> int:
        """All shards, the root gathered, and the largest block gathered beside them."""
        return sum(self._blocks) + self._root + self._ranks * (self._root + max(self._blocks))

    def _shard(self, unit: Shapes) -> int:
        """Bytes of one rank: every tensor is cut along its first dimension, and padded to the same for all ranks."""
        return BFLOAT16_BYTES * sum(-(-shape[0] // self._ranks) * math.prod(shape[1:]) for shape in unit)


def published() -> dict[str, Any]:
    """The 14B in int8 with us and in bf16 with FSDP: computed, of the busiest and of the fullest rank."""
    work = Workload.of_size(SIZE)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = (
            Artifact.open(write_shape_artifact(Path(folder) / precision, precision=precision))
            for precision in ("int8", "bf16")
        )
        sizes = model_sizes(ours)
        rows = [_published_row(sizes, work, name, layout) for name, layout in layouts()]
        least = Placement(streamed_layers=tuple(range(sizes.config.num_layers)))
        rows += [_published_fsdp(sizes, work, theirs, ranks) for ranks in RANKS]
    return {
        "label": "computed from the formulas that the tiny model's counts are compared with; not measured",
        "size": SIZE,
        "sample_steps": work.sample_steps,
        "placements": f"planned for {CARD} with {VRAM_GIB} GiB each and {RAM_GIB} GiB of host memory",
        "rows": rows,
        "all_layers_streamed_parameter_bytes": held(sizes, least, ParallelLayout(), 0),
    }


def _published_row(sizes: ModelSizes, work: Workload, name: str, layout: ParallelLayout) -> dict[str, Any]:
    ranks = range(layout.world_size)
    team = plan_team(
        sizes,
        work,
        layout,
        Machines(
            cards=[CARDS[CARD]] * len(ranks),
            vram_bytes=[int(VRAM_GIB * 2**30)] * len(ranks),
            machines=[0] * len(ranks),
            ram_bytes=[RAM_GIB * 2**30],
        ),
    )
    placements = [plan.placement for plan in team.ranks]
    return {
        "name": name,
        "ranks": len(ranks),
        "weights": "int8",
        "sent_bytes": busiest(sent(sizes, work, layout, rank) for rank in ranks),
        "parameter_bytes": max(held(sizes, placements[rank], layout, rank) for rank in ranks),
        "streamed_layers": max(len(placement.streamed_layers) for placement in placements),
    }


def _published_fsdp(sizes: ModelSizes, work: Workload, artifact: Artifact, ranks: int) -> dict[str, Any]:
    fsdp, layout = Fsdp.of(artifact, ranks), ParallelLayout(num_gpus_dit=ranks, ulysses_size=ranks)
    exchanged = busiest(sent(sizes, work, layout, rank) for rank in range(ranks))
    return {
        "name": f"fsdp-{ranks}",
        "ranks": ranks,
        "weights": "bf16",
        "sent_bytes": exchanged | {"parameters": fsdp.sent(work.sample_steps)},
        "parameter_bytes": fsdp.held(),
        "streamed_layers": 0,
    }


def busiest(ranks: Iterator[dict[str, int]]) -> dict[str, int]:
    return max(ranks, key=lambda sent: sum(sent.values()))


def compared(job: Any, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """A layout's row: what was counted on each rank beside what the formulas say."""
    artifact, work = Artifact.open(Path(job.artifact)), job.work
    sizes, steps = model_sizes(artifact), range(work.sample_steps)
    options = MemoryOptions(offload_model=job.offload)
    placement = placement_on_cpu(options, sizes.config.num_layers, steps, work.sample_steps)
    rows = []
    for rank, counted in enumerate(ranks):
        expected = {"sent_bytes": sent(sizes, work, job.layout, rank)}
        expected["parameter_bytes"] = held(sizes, placement, job.layout, rank)
        if job.fsdp:
            fsdp = Fsdp.of(artifact, job.layout.world_size)
            expected["sent_bytes"]["parameters"] = fsdp.sent(work.sample_steps)
            expected["parameter_bytes"] = fsdp.held()
        rows.append(
            {
                "role": counted["role"],
                "counted": {key: counted[key] for key in ("sent_bytes", "parameter_bytes")},
                "formula": expected,
                "counted_by_runtime": counted["sent_bytes_by_runtime"],
            }
        )
    return {
        "name": job.name,
        "ranks": len(ranks),
        "weights": sizes.precision,
        "sent_bytes": busiest(row["counted"]["sent_bytes"] for row in rows),
        "parameter_bytes": max(row["counted"]["parameter_bytes"] for row in rows),
        "as_expected": all(row["counted"] == row["formula"] and agrees(row) for row in rows),
        "by_rank": rows,
    }


def agrees(row: dict[str, Any]) -> bool:
    """Whether the runtime's own count says the same."""
    return all(row["counted"]["sent_bytes"][key] == row["counted_by_runtime"][key] for key in ("exchange", "latents"))


def same_latents(rows: list[dict[str, Any]], found: dict[str, list[dict[str, Any]]]) -> dict[str, bool]:
    """Whether FSDP's ranks compute what Ulysses' do, bit by bit: they are to take the same steps."""
    pairs = {row["name"]: row["name"].replace("fsdp", "ulysses") for row in rows if row["name"].startswith("fsdp")}
    return {
        f"{theirs} and {ours}": found[theirs][0]["latents"] == found[ours][0]["latents"]
        for theirs, ours in pairs.items()
        if ours in found
    }
