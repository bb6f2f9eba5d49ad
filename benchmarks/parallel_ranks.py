"""What a process of ``parallel.py`` does: it is a rank of one layout after the other, and counts or times its part.

Conditions are random: nothing is encoded or decoded. Shapes: C latent channels, F latent frames, h x w latent size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from parallel_book import Book
from parallel_fsdp import FsdpDenoiser

from lowvram.denoise.denoiser import Denoiser
from lowvram.encode.conditions import Conditions
from lowvram.encode.voice import WholeVoice
from lowvram.offload.oom import Ladder, Rung
from lowvram.offload.placement import MemoryOptions
from lowvram.parallel.rank import joined
from lowvram.parallel.rank_env import RankEnv
from lowvram.parallel.rank_team import RankTeam
from lowvram.planning import Workload
from lowvram.planning.decide import decide
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.request import Request
from lowvram.runtime import Run, Runtime
from lowvram.schedule import Block, blocks_of
from lowvram_models.config import DiTConfig
from lowvram_quantize.format import Artifact, Component

Tensor = torch.Tensor
INFER_FRAMES, STEPS = 36, 4
# To time, enough blocks for those between the filling and the draining of a wave.
CLIPS_COUNTED, CLIPS_TIMED = 2, 6
ADDRESS = "127.0.0.1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One layout with one artifact. ``counts``: bytes are counted, which takes time; else seconds are measured.
    ``offload``: all layers are streamed. ``port`` is that of a store which is kept by who starts the ranks."""

    name: str
    layout: ParallelLayout
    artifact: str
    latent_size: tuple[int, int]
    fsdp: bool = False
    offload: bool = False
    counts: bool = True
    device: str = "cpu"
    port: int = 0

    @property
    def work(self) -> Workload:
        return Workload(latent_size=self.latent_size, infer_frames=INFER_FRAMES, sample_steps=STEPS)

    @property
    def clips(self) -> int:
        return CLIPS_COUNTED if self.counts else CLIPS_TIMED

    @property
    def steady(self) -> slice:
        """Blocks behind which rings are full, the sink is as it stays, and as many are under way as can be. Counts are
        made with one at a time."""
        first, beyond = self.work.blocks_per_clip, self.clips * self.work.blocks_per_clip
        return slice(first, beyond) if self.counts else slice(first + STEPS, beyond - STEPS)

    def blocks(self) -> Iterator[Block]:
        return blocks_of(self.clips, self.work.frames_per_clip)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Job:
        size = tuple(value["latent_size"])
        return cls(**value | {"layout": ParallelLayout(**value["layout"]), "latent_size": size})


def be_rank(rank: int, jobs: Path, answer: Path) -> None:
    """Do rank ``rank``'s part of every job in the file ``jobs``, and write the reports, by the jobs' names."""
    torch.set_num_threads(1)
    found = {
        job.name: take_part(job, rank)
        for job in map(Job.from_json, json.loads(jobs.read_text()))
        if rank < job.layout.world_size
    }
    answer.write_text(json.dumps(found))


def take_part(job: Job, rank: int) -> dict[str, Any]:
    env = RankEnv(rank=rank, world_size=job.layout.world_size, local_rank=rank, address=ADDRESS, port=job.port)
    with joined(env, job.layout, job.device) as (team, where, _):
        book = Book(team, torch.device(where), counts=job.counts)
        with torch.inference_mode(), mock.patch.object(Component, "read_slab", copied(Component.read_slab)):
            run(job, team, book)
        return book.report(job.steady)


def copied(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """On a CPU weights may stay where the artifact's file is mapped; here they are copied, as they are to a GPU."""

    def read_slab(component: Component, slab: str) -> Tensor:
        return read(component, slab).clone()

    return read_slab


def run(job: Job, team: RankTeam, book: Book) -> None:
    """All blocks of the video, or this rank's part of them, with a mark in the book after each."""
    artifact, work = Artifact.open(Path(job.artifact)), job.work
    memory = MemoryOptions(kv="bf16" if job.counts or job.fsdp else "auto", offload_model=job.offload)
    runtime = Runtime(artifact, book.device, "bfloat16", memory)
    stage = team.role.stage
    steps = range(0) if stage is None else team.layout.steps(stage, STEPS)
    placement = decide(artifact, work, book.device, memory, team).placement
    rung = Rung(placement=placement, online_decode=True)
    ladder = Ladder(rung, layers=runtime.dit_config["num_layers"], steps=steps, allowed=False)
    if not team.role.denoises:
        for block, latent in team.arriving(job.blocks(), work.latent_size):
            book.mark(block, latent)
        return
    conditions = random_conditions(DiTConfig.from_dict(runtime.dit_config), job)
    request = Request(image=Path("-"), audio=Path("-"), prompt="-", infer_frames=INFER_FRAMES, sample_steps=STEPS)
    denoiser = (FsdpDenoiser if job.fsdp else Denoiser)(
        Run(runtime=runtime, ladder=ladder), request, work.latent_size, conditions, team, steps
    )
    book.watch(denoiser.rollout.dit, getattr(denoiser, "shards", ()))
    chain = team.chain(job.blocks(), work.latent_size, clips=job.clips)
    with book.counting():
        for block, latent, _ in denoiser.run(job.blocks(), chain):
            book.mark(block, latent)


def random_conditions(config: DiTConfig, job: Job) -> Conditions:
    """The same for all ranks."""
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    return Conditions(
        context=randn(min(20, config.text_len), config.text_dim),
        audio=WholeVoice(randn(1, config.audio_layers, config.audio_dim, job.clips * INFER_FRAMES)),
        reference=randn(16, 1, *job.latent_size),
        motion=randn(16, 19, *job.latent_size),
    )
