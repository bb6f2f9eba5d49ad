"""Dry run: without a GPU and without values: the runtime itself on a simulated device, to see what it would take."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowvram.encode.conditions import Conditions
from lowvram.encode.voice import WholeVoice
from lowvram.offload.placement import MemoryOptions
from lowvram.parallel.team import SingleRank
from lowvram.pipeline import AvatarPipeline, Inputs, Request
from lowvram.planning.cards import Card
from lowvram.planning.planner import TeamPlan
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.planning.rank_plan import Plan
from lowvram.simulate.device import SimulatedDevice
from lowvram.simulate.other_ranks import PretendTeam
from lowvram_kernels.chips import without_triton
from lowvram_models.config import DiTConfig
from lowvram_models.constants import FPS, LATENT_CHANNELS, MOTION_LATENTS, SPEECH_RATE_HZ
from lowvram_quantize.format import Artifact

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a simulated run took, in bytes. ``stages`` has the peak of what was allocated in each stage;
    ``block_in`` and ``block_out`` are copies to and from the device while a block of the last clip was made; ``sent``
    would go to other ranks in exchanges, all blocks together. ``kernels``: whose temporaries these are, as "triton", or
    "torch (triton is not installed)" where Triton's would not run, or cannot be looked at."""

    stages: dict[str, int]
    peak_allocated: int
    peak_reserved: int
    block_in: int
    block_out: int
    given_up: tuple[str, ...]
    sent: int
    kernels: str


def dry_run(
    artifact: Path | Artifact,
    plan: Plan,
    *,
    clips: int = 2,
    capacity: int | None = None,
    layout: ParallelLayout | None = None,
) -> DryRun:
    """Run ``plan`` over ``clips`` clips on a simulated device of ``capacity`` bytes (default: the plan's budget).

    Everything is computed but the values: the same code, layer by layer, with the same tensors for as long, and with
    the kernels that the planned card's generation would run (``generation_of``). Clips from the second on see full
    rings. With a ``layout``, ``plan`` is that of one of its ranks: the others' part in exchanges is made up. Where
    weights stay for a next video, another one follows, with another prompt.

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
        speech=np.ones(int(seconds * SPEECH_RATE_HZ), np.float32),
    )
    device = SimulatedDevice(
        capacity or plan.vram_budget_bytes, expandable_segments=True, generation=generation_of(plan.card)
    )
    with device as gpu:
        slower = without_triton(gpu.engine.device)
        memory = MemoryOptions(placement=plan.placement, resident=plan.resident)
        team = _team(opened, plan, inputs, clips, layout)
        engine, crossed = gpu.engine, [(0, 0)]
        pipeline = AvatarPipeline(opened, engine.device, work.dtype_name, memory=memory, team=team, engine=engine)
        for prompt in (request.prompt, f"{request.prompt} again") if plan.resident else (request.prompt,):
            asked = dataclasses.replace(request, prompt=prompt)
            for _ in _blocks(pipeline, dataclasses.replace(inputs, request=asked)):
                crossed.append((engine.bytes_in, engine.bytes_out))
    crossings = [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(crossed)]
    last = crossings[-work.blocks_per_clip :]
    stages = {stage.name: stage for stage in pipeline.runtime.stages.stages.values()}
    return DryRun(
        stages={name: stage.peak_vram_allocated_bytes for name, stage in stages.items()},
        peak_allocated=max(stage.peak_vram_allocated_bytes for stage in stages.values()),
        peak_reserved=max(stage.peak_vram_reserved_bytes for stage in stages.values()),
        block_in=sum(inward for inward, _ in last) // len(last),
        block_out=sum(outward for _, outward in last) // len(last),
        given_up=tuple(pipeline.run.ladder.events),
        sent=sum(team.sent_bytes().values()),
        kernels="triton" if slower is None else f"torch ({slower.why})",
    )


def generation_of(card: Card) -> int:
    """The generation whose kernels a dry run for the card takes: its own, or the one it was measured with. Of a card
    that was measured before that was noted it is 89 where its rates have FP8 units, else 86: from 80 on, generations
    differ in the temporaries of fp8 weights alone."""
    return card.generation or card.rates.generation or (89 if card.has_fp8 else 86)


def _blocks(pipeline: AvatarPipeline, inputs: Inputs) -> Iterator[Any]:
    return pipeline.stream(inputs) if pipeline.team.role.media else pipeline.serve(inputs.request)


def dry_run_team(artifact: Path | Artifact, plan: TeamPlan, *, clips: int = 2) -> list[DryRun]:
    """Run the plan of every rank; see ``dry_run``. Ranks with equal shares and placements take the same: one is run."""
    opened = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact)
    found: dict[Any, DryRun] = {}
    runs: list[DryRun] = []
    for rank in plan.ranks:
        share = rank.share
        key = (
            rank.device,
            rank.placement.wave,
            len(share.steps),
            share.heads,
            share.block_tokens,
            rank.vram_budget_bytes,
        )
        if key not in found:
            found[key] = dry_run(opened, rank, clips=clips, layout=plan.layout)
        runs.append(found[key])
    return runs


def _team(
    artifact: Artifact, plan: Plan, inputs: Inputs, clips: int, layout: ParallelLayout | None
) -> SingleRank | PretendTeam:
    if layout is None or layout.world_size == 1:
        return SingleRank()
    config, frames = DiTConfig.from_dict(artifact.component("dit").config), clips * plan.workload.infer_frames
    size = inputs.latent_size
    conditions = Conditions(
        context=torch.zeros(config.text_len, config.text_dim),
        audio=WholeVoice(torch.zeros(1, config.audio_layers, config.audio_dim, frames)),
        reference=torch.zeros(LATENT_CHANNELS, 1, *size),
        motion=torch.zeros(LATENT_CHANNELS, MOTION_LATENTS, *size),
    )
    return PretendTeam(layout, plan.share.role.rank, size, conditions)
