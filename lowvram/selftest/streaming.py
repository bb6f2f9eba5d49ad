"""Checks of what moves: copies with and without pinning, the tiny model wherever its weights lie, CUDA graphs."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from lowvram.demo import TINY_LAYERS, tiny_model
from lowvram.encode.conditions import Conditions
from lowvram.encode.voice import WholeVoice
from lowvram.offload.copy_engine import engine_for
from lowvram.offload.placement import MemoryOptions, Placement
from lowvram.parallel.team import Alone, Chain, LatentSize, SingleRank
from lowvram.pipeline import AvatarPipeline
from lowvram.request import Request
from lowvram.schedule import Block
from lowvram.selftest.checks import Check
from lowvram.selftest.results import REPLAYS, Result, Subject
from lowvram_models.config import DiTConfig
from lowvram_models.constants import LATENT_CHANNELS, MOTION_LATENTS
from lowvram_quantize.format import Artifact

Tensor = torch.Tensor
COPY_BYTES = 64 * 2**20
CPU_COPY_BYTES = 2**20
STEPS = 2
LATENT_SIZE = (16, 16)
CONTEXT_TOKENS = 12
_WITHOUT_REPORTS = "report it with this text (lowvram selftest --report FILE); keep everything on one side meanwhile"


def moving_checks(device: torch.device) -> Iterator[Check]:
    for pinned in (True, False) if device.type == "cuda" else (False,):
        name = f"copies {'with' if pinned else 'without'} pinning"
        subject = Subject(name=name)
        yield Check(subject=subject, run=functools.partial(copies, subject, device, pinned))
    subject = Subject(name="tiny model: on the device, and streamed from the host")
    yield Check(subject=subject, run=functools.partial(placements, subject, device))
    if device.type == "cuda":
        subject = Subject(name=REPLAYS)
        yield Check(subject=subject, run=functools.partial(graphs, subject, device))


def copies(subject: Subject, device: torch.device, pinned: bool) -> Result:
    """Random bytes there and back, through the engine that runs have."""
    engine, nbytes = engine_for(device), COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES
    given, back = (engine.host_buffer(nbytes) if pinned else torch.empty(nbytes, dtype=torch.uint8) for _ in range(2))
    given.random_(0, 256)
    back.zero_()
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    figures = {}
    for name, copy in (
        ("in_bytes_per_s", lambda: engine.copy_in(there, given, engine.now())),
        ("out_bytes_per_s", lambda: engine.copy_out(back, there, engine.now())),
    ):
        engine.settle()
        begin = time.perf_counter()
        copy()
        engine.settle()
        figures[name] = nbytes / (time.perf_counter() - begin)
    wrong = int((given != back).sum())
    message = f"{wrong} of {nbytes} bytes came back otherwise; {_WITHOUT_REPORTS}" if wrong else ""
    return Result(subject=subject, status="failed" if wrong else "passed", message=message, figures=figures)


class OnlyDenoising(SingleRank):
    """Stands for ranks that encode random conditions and decode nothing; keeps the latents that come."""

    def __init__(self, artifact: Path, request: Request):
        super().__init__()
        config = DiTConfig.from_dict(Artifact.open(artifact).component("dit").config)
        height, width = LATENT_SIZE
        frames = (request.num_clip or 1) * request.infer_frames
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
        self._conditions = Conditions(
            context=draw(CONTEXT_TOKENS, config.text_dim),
            audio=WholeVoice(draw(1, config.audio_layers, config.audio_dim, frames)),
            reference=draw(LATENT_CHANNELS, 1, height, width),
            motion=draw(LATENT_CHANNELS, MOTION_LATENTS, height, width),
        )
        self._kept = _Kept()

    @property
    def latents(self) -> Tensor:
        """Of all blocks, in one row on the CPU."""
        return torch.cat([latent.flatten().cpu() for latent in self._kept.latents])

    def share(self, what: str, value: Any) -> list[Any]:
        return [LATENT_SIZE if what == "latent_size" else value]

    def share_conditions(self, conditions: Conditions | None) -> Conditions:
        return self._conditions

    def chain(self, blocks: Iterable[Block], latent_size: LatentSize, *, clips: int) -> Chain:
        return self._kept


class _Kept(Alone):
    def __init__(self) -> None:
        super().__init__()
        self.latents: list[Tensor] = []

    def pass_on(self, block: Block, latent_CFhw: Tensor) -> None:
        super().pass_on(block, latent_CFhw)
        self.latents.append(latent_CFhw)


def latents(device: torch.device, model: tuple[Path, Request], placement: Placement) -> Tensor:
    """All latents of a short video in one row, with 8-bit rings."""
    made, _ = _run(device, model, placement, graphs=False)
    return made


def _run(
    device: torch.device, model: tuple[Path, Request], placement: Placement, graphs: bool
) -> tuple[Tensor, AvatarPipeline]:
    artifact, request = model
    memory, team = MemoryOptions(placement=placement, cuda_graphs=graphs), OnlyDenoising(artifact, request)
    pipeline = AvatarPipeline.from_artifact(artifact, device=str(device), memory=memory, team=team)
    for _ in pipeline.serve(request):
        pass
    return team.latents, pipeline


def placements(subject: Subject, device: torch.device) -> Result:
    """Everything on the device; layers and rings on the host, copied in as they are wanted."""
    cells = tuple((step, layer) for step in range(STEPS) for layer in range(TINY_LAYERS))
    streamed = Placement(streamed_layers=tuple(range(TINY_LAYERS)), host_rings=cells, kv="int8")
    with tempfile.TemporaryDirectory(prefix="lowvram-selftest-") as folder:
        model = tiny_model(Path(folder), steps=STEPS, clips=2 if device.type == "cuda" else 1)
        here, there = (latents(device, model, placement) for placement in (Placement(kv="int8"), streamed))
    return compared(subject, here, there)


def graphs(subject: Subject, device: torch.device) -> Result:
    with tempfile.TemporaryDirectory(prefix="lowvram-selftest-") as folder:
        model = tiny_model(Path(folder), steps=STEPS, clips=5)
        plain, _ = _run(device, model, Placement(kv="int8"), graphs=False)
        replayed, pipeline = _run(device, model, Placement(kv="int8"), graphs=True)
    counts = pipeline.run.graphs
    if not counts.get("replayed"):
        return Result(subject=subject, status="failed", message=f"nothing was replayed ({counts}); leave --cuda-graphs")
    return compared(subject, plain, replayed)


def compared(subject: Subject, one: Tensor, other: Tensor) -> Result:
    """Latents have to be the same bit for bit, and numbers."""
    if not one.isfinite().all() or not other.isfinite().all():
        return Result(subject=subject, status="failed", message=f"latents are NaN or infinite; {_WITHOUT_REPORTS}")
    if torch.equal(one, other):
        return Result(subject=subject, status="passed", error=0.0, bound=0.0)
    differ = int((one != other).sum())
    message = f"{differ} of {len(one)} values of the latents differ; {_WITHOUT_REPORTS}"
    return Result(subject=subject, status="failed", message=message, error=float((one - other).abs().max()), bound=0.0)
