"""A run without a GPU and without values: the runtime itself on a simulated device, to see what it would take."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from pathlib import Path

import numpy as np
import torch

from lowvram.pipeline import FPS, AvatarPipeline, Inputs, Request
from lowvram.placement import MemoryOptions
from lowvram.planning.planner import Plan
from lowvram.simulate import SimulatedDevice
from lowvram_quantize.format import Artifact

log = logging.getLogger(__name__)
SAMPLES_PER_S = 16000


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a simulated run took, in bytes. ``stages`` has the peak of what was allocated in each stage;
    ``block_in`` and ``block_out`` are copies to and from the device while a block of the last clip was made."""

    stages: dict[str, int]
    peak_allocated: int
    peak_reserved: int
    block_in: int
    block_out: int
    given_up: tuple[str, ...]


def dry_run(artifact: Path | Artifact, plan: Plan, *, clips: int = 2, capacity: int | None = None) -> DryRun:
    """Run ``plan`` over ``clips`` clips on a simulated device of ``capacity`` bytes (default: the plan's budget).

    Everything is computed but the values: the same code, layer by layer, with the same tensors for as long. Clips
    from the second on see full rings.

    Raises:
        OutOfMemoryError: the device was too small, whatever was given up.
    """
    opened = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact)
    work = plan.workload
    request = Request(
        image=Path("none"),
        audio=Path("none"),
        prompt="A person speaks",
        infer_frames=work.infer_frames,
        sample_steps=work.sample_steps,
        num_clip=clips,
    )
    seconds = clips * work.infer_frames / FPS
    inputs = Inputs(
        request=request,
        portrait=torch.zeros(3, *work.size_px),
        speech=np.ones(int(seconds * SAMPLES_PER_S), np.float32),
    )
    with SimulatedDevice(capacity or plan.vram_budget_bytes, expandable_segments=True):
        pipeline = AvatarPipeline(opened, torch.device("meta"), memory=MemoryOptions(placement=plan.placement))
        crossed = [(0, 0)]
        for _ in pipeline.stream(inputs):
            crossed.append((pipeline.runtime.engine.bytes_in, pipeline.runtime.engine.bytes_out))
    blocks = [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(crossed)]
    last = blocks[-work.blocks_per_clip :]
    stages = {stage.name: stage for stage in pipeline.runtime.stages.stages.values()}
    return DryRun(
        stages={name: stage.peak_vram_allocated_bytes for name, stage in stages.items()},
        peak_allocated=max(stage.peak_vram_allocated_bytes for stage in stages.values()),
        peak_reserved=max(stage.peak_vram_reserved_bytes for stage in stages.values()),
        block_in=sum(inward for inward, _ in last) // len(last),
        block_out=sum(outward for _, outward in last) // len(last),
        given_up=tuple(pipeline.runtime.relief.events),
    )
