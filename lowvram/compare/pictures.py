"""Pictures of a comparison that a page holds in itself: clips of both runs with their difference, and single frames."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lowvram.compare.metrics import Frame
from lowvram.compare.result import Comparison
from lowvram.compare.sources import Frames
from lowvram.media.contact_sheet import amplified
from lowvram.media.sound import Sound
from lowvram.media.video import VideoWriter, probe

LONGEST_S = 60
"""Of a longer video so much is shown: what surrounds the worst frame."""
STILLS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """An MP4 of baseline, candidate and amplified difference beside each other, so that they cannot fall out of step;
    it begins at ``start_s`` of the runs and is ``seconds`` long of ``total_s``. ``data`` is base64, ``poster`` is its
    middle frame as a data URI."""

    data: str
    poster: str
    start_s: float
    seconds: float
    total_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Still:
    """Frame number ``index`` of both runs and their amplified difference, each a PNG as a data URI."""

    index: int
    time_s: float
    baseline: str
    candidate: str
    difference: str


def make_clip(comparison: Comparison) -> Clip | None:
    """With the sound of one of the videos, where there is one; None where no frames were compared."""
    if not comparison.pictures or not comparison.frames:
        return None
    ours, theirs = comparison.pictures
    total, longest, fps = len(comparison.frames), round(LONGEST_S * theirs.fps), theirs.fps
    worst = comparison.worst_frame
    first = max(0, min(total - longest, (worst.index if worst else 0) - longest // 2))
    count = min(total, longest)
    poster = ""
    with tempfile.TemporaryDirectory(prefix="lowvram-clip-") as folder:
        path = Path(folder) / "clip.mp4"
        # Coding takes even sizes only; what an odd one has too little is filled up with black.
        height, width = theirs.height + theirs.height % 2, 3 * theirs.width + theirs.width % 2
        sound = _sound(comparison, first / fps, count / fps)
        with VideoWriter(path, height, width, fps=max(1, round(fps)), audio_path=sound, trim_to_audio=False) as writer:
            shown = itertools.islice(_pairs(ours, theirs), first, first + count)
            for index, (candidate, baseline) in enumerate(shown):
                strip = np.zeros((1, height, width, 3), np.uint8)
                strip[0, : theirs.height, : 3 * theirs.width] = np.concatenate(
                    [baseline, candidate, amplified(candidate, baseline)], axis=1
                )
                writer.write(strip)
                if index == count // 2:
                    poster = _png(strip[0])
        data = base64.b64encode(path.read_bytes()).decode()
    return Clip(data=data, poster=poster, start_s=first / fps, seconds=count / fps, total_s=total / fps)


def make_stills(comparison: Comparison) -> list[Still]:
    """The ``STILLS`` worst frames by PSNR, a second apart from each other at least, worst first; where all frames are
    identical, the first, middle and last."""
    if not comparison.pictures or not comparison.frames:
        return []
    ours, theirs = comparison.pictures
    chosen = _worst(comparison, round(theirs.fps))
    found: dict[int, Still] = {}
    for index, (candidate, baseline) in enumerate(_pairs(ours, theirs)):
        if index in chosen:
            found[index] = Still(
                index=index,
                time_s=index / theirs.fps,
                baseline=_png(baseline),
                candidate=_png(candidate),
                difference=_png(amplified(candidate, baseline)),
            )
        if len(found) == len(chosen):
            break
    return [found[index] for index in chosen]


def _worst(comparison: Comparison, apart: int) -> Sequence[int]:
    frames = comparison.frames
    if comparison.worst_frame is None:
        return sorted({0, len(frames) // 2, len(frames) - 1})
    chosen: list[int] = []
    for frame in sorted(frames, key=lambda frame: frame.psnr):
        if all(abs(frame.index - other) >= apart for other in chosen):
            chosen.append(frame.index)
    return chosen[:STILLS]


def _pairs(ours: Frames, theirs: Frames) -> Iterator[tuple[Frame, Frame]]:
    with contextlib.ExitStack() as stack:
        both = (stack.enter_context(contextlib.closing(frames.source.read())) for frames in (ours, theirs))
        yield from zip(*both, strict=False)


def _sound(comparison: Comparison, start_s: float, duration_s: float) -> Sound | None:
    for source in (comparison.right, comparison.left):
        if source.video and probe(source.video.path)["has_audio"]:
            return Sound(path=source.video.path, start_s=start_s, duration_s=duration_s)
    return None


def _png(frame: Frame) -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
