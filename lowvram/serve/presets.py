"""Presets of the card that is there: sizes that its plan says fit, and what they take."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from lowvram.parallel.team import SingleRank
from lowvram.pipeline import AvatarPipeline
from lowvram.planning.decide import decide
from lowvram.planning.rank_plan import Plan
from lowvram.planning.workload import Workload
from lowvram_kernels.errors import OutOfMemoryError
from lowvram_models.constants import FRAMES_PER_LATENT

log = logging.getLogger(__name__)
SIZES = ("384*256", "704*384", "832*480", "1280*720")
"""From small to large; few, as the plan of each takes seconds, once."""
FRAMES = (48, 24, 12)
"""A clip's, from what the model is used with downwards."""
_STEPS = 4
_UNPLANNED = ("384*256", "704*384", "832*480")
_SHARE = 0.5
NOT_PREDICTED = "there is no GPU here: what fits, and how fast it is, is predicted for GPUs alone"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings under a name; the others are None where nothing is predicted: ``seconds_per_block`` (12 frames, but for
    a last shorter one), ``frames_per_second`` while it runs, ``vram_bytes`` and ``host_bytes`` at the most."""

    name: str
    size: str
    infer_frames: int = 48
    sample_steps: int = _STEPS
    seconds_per_block: float | None = None
    frames_per_second: float | None = None
    vram_bytes: int | None = None
    host_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Presets:
    """``presets`` from light to best; fewer where the card takes fewer. ``note`` says what they do not tell."""

    presets: tuple[Preset, ...]
    device: str
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"device": self.device, "note": self.note, "presets": [each.to_json() for each in self.presets]}


def presets_of(pipeline: AvatarPipeline) -> Presets:
    """What ``decide`` plans for the pipeline's card, as it is now; seconds. On a processor nothing is predicted."""
    runtime = pipeline.runtime
    if runtime.device.type != "cuda":
        names = zip(("light", "balanced", "best"), _UNPLANNED, strict=True)
        found = tuple(Preset(name=name, size=size) for name, size in names)
        return Presets(presets=found, device=str(runtime.device), note=NOT_PREDICTED)

    def planned(size: str, infer_frames: int) -> Plan | None:
        work = Workload.of_size(size, infer_frames=infer_frames, sample_steps=_STEPS, dtype=runtime.dtype)
        work = dataclasses.replace(work, voice_on_host=True)
        try:
            return decide(runtime.artifact, work, runtime.device, runtime.memory, SingleRank()).plan
        except OutOfMemoryError as error:
            log.info("%s", error)
            return None

    return choose(planned, str(runtime.device))


def choose(planned: Callable[[str, int], Plan | None], device: str) -> Presets:
    """``light`` is the smallest size, ``best`` the largest that fits, ``balanced`` the largest that makes at least half
    as many frames a second as ``light``. ``planned`` gives a size's plan, None where it does not
    fit."""
    for infer_frames in FRAMES:
        plans = {size: plan for size in SIZES if (plan := planned(size, infer_frames)) is not None}
        if plans:
            break
    else:
        said = f"not even {SIZES[0]} with {FRAMES[-1]} frames a clip fits this card; give more memory"
        return Presets(presets=(), device=device, note=said)
    rates = {size: _rate(plan) for size, plan in plans.items()}
    fitting = list(plans)
    light, best = fitting[0], fitting[-1]
    balanced = [size for size in fitting if rates[size] >= _SHARE * rates[light]][-1]
    chosen = {"light": light, "balanced": balanced, "best": best}
    found = tuple(_preset(name, size, infer_frames, plans[size]) for name, size in chosen.items())
    return Presets(presets=found, device=device, note="predicted, for a voice of any length")


def _rate(plan: Plan) -> float:
    return FRAMES_PER_LATENT * plan.workload.frames_per_block / plan.seconds_per_block


def _preset(name: str, size: str, infer_frames: int, plan: Plan) -> Preset:
    return Preset(
        name=name,
        size=size,
        infer_frames=infer_frames,
        seconds_per_block=plan.seconds_per_block,
        frames_per_second=_rate(plan),
        vram_bytes=plan.peak_vram_bytes,
        host_bytes=plan.peak_host_bytes,
    )
