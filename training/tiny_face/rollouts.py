"""What the trained model says of the rollout: drift, seeds, the refreshed sink, blocks and clips that are cut short."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import numpy as np
from torch import Tensor

from lowvram.compare.metrics import psnr
from lowvram.encode.conditions import Conditions
from lowvram.parallel.team import Alone, Chain, SingleRank
from lowvram.pipeline import AvatarPipeline
from lowvram_models.constants import DROPPED_FIRST_FRAMES, FPS
from training.tiny_face.case import Case, Frames

CLIP_FRAMES = 48
SEEDS = (420, 1, 2)
CLIPS = (48, 40, 32, 20)
"""Frames a clip: of 4, 3 and a third, 2 and two thirds, and 1 and two thirds blocks."""


def over_time(case: Case, pipeline: AvatarPipeline, window_s: float) -> dict[str, Any]:
    """Window by window of a long video, never held as a whole; and how figures change over all of it."""
    found: list[dict[str, float]] = []
    size, kept, done = round(window_s * FPS), np.zeros((0, *case.portrait.shape), np.uint8), 0
    for frames in case.video(pipeline):
        kept = np.concatenate([kept, frames])[: case.frames - done]
        if len(kept) < size and done + len(kept) < case.frames:
            continue
        part, kept = kept[:size], kept[size:]
        if not len(part):
            break
        found.append({"from_s": done / FPS, **case.facts(part, done)})
        done += len(part)
        print(f"{case.name}: {done / FPS:.0f} s", found[-1], file=sys.stderr, flush=True)
    return {"drift": drift(found), "windows": found}


def drift(windows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of each figure the first, the last and the lowest window, and the slope of a straight line a minute."""
    minutes = [window["from_s"] / 60 for window in windows]
    found = {}
    for name in sorted(set(windows[0]) - {"from_s"}):
        values = [window[name] for window in windows]
        slope = float(np.polyfit(minutes, values, 1)[0]) if len(values) > 1 else 0.0
        found[name] = {"first": values[0], "last": values[-1], "lowest": min(values), "a_minute": slope}
    return found


def seeds(case: Case, pipeline: AvatarPipeline) -> dict[str, Any]:
    """The same request with several seeds: each one's figures, and the PSNR between each two."""
    videos = {seed: case.whole(pipeline, base_seed=seed) for seed in SEEDS}
    pairs = itertools.combinations(SEEDS, 2)
    return {
        "each": {str(seed): case.facts(frames) for seed, frames in videos.items()},
        "psnr_between": {f"{one} and {other}": psnr(videos[one], videos[other]) for one, other in pairs},
    }


class Unrefreshed(SingleRank):
    """The sink stays as the portrait filled it: what is refreshed from the second clip on is refreshed with it."""

    def __init__(self) -> None:
        super().__init__()
        self._portrait: Tensor | None = None

    def share_conditions(self, conditions: Conditions | None) -> Conditions:
        shared = super().share_conditions(conditions)
        self._portrait = shared.reference
        return shared

    def chain(self, *_: Any, **__: Any) -> Chain:
        chain = Alone()
        chain.reference = lambda: self._portrait
        return chain


def refresh(case: Case, pipeline: AvatarPipeline, unrefreshed: AvatarPipeline) -> dict[str, Any]:
    """From the second clip on a generated frame stands for the portrait: each clip with it and without, and how far
    frames are from the ones before, in 8-bit steps, where the sink changes and at the other blocks' beginnings."""
    found = {}
    for name, each in {"refreshed": pipeline, "portrait_kept": unrefreshed}.items():
        frames = case.whole(each)
        border = CLIP_FRAMES - DROPPED_FIRST_FRAMES
        starts = [0, *range(border, len(frames), CLIP_FRAMES)]
        clips = [case.facts(frames[a:b], a) for a, b in itertools.pairwise([*starts, len(frames)])]
        steps = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
        others = [float(steps[at - 1]) for at in range(border % 12, len(frames), 12) if at and at != border]
        found[name] = {
            "clips": clips,
            "step_at_refresh": float(steps[border - 1]),
            "steps_at_other_blocks": {"mean": float(np.mean(others)), "largest": max(others)},
        }
    return found


def short_blocks(case: Case, pipeline: AvatarPipeline) -> dict[str, Any]:
    """Clips whose last block is shorter than a whole one, and the last second of a video whose last clip is cut."""
    found = {}
    for clip in CLIPS:
        frames = case.whole(pipeline, infer_frames=clip)
        end = frames[-FPS:]
        found[str(clip)] = {
            "blocks_a_clip": math.ceil(clip / 12),
            "frames_of_last_block": clip % 12 or 12,
            "frames": len(frames),
            **case.facts(frames),
            "last_second": case.facts(end, len(frames) - len(end)),
            "drawn_psnr_in_last_blocks": in_last_blocks(case, frames, clip),
        }
    return found


def in_last_blocks(case: Case, frames: Frames, clip: int) -> float:
    """PSNR against drawn frames of those that clips' last blocks show."""
    length = clip % 12 or 12
    first = clip - DROPPED_FIRST_FRAMES - length
    shown = [at for start in range(first, len(frames), clip) for at in range(start, min(start + length, len(frames)))]
    return psnr(frames[shown], np.concatenate([case.drawn(range(at, at + 1)) for at in shown]))
