"""Compare two runs of the same seed: latents block by block, frames by PSNR and SSIM, stages by seconds and bytes.

The first of the two is the candidate, the second the baseline it is measured against.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lowvram.compare.metrics import FrameScore, FrameScorer, TensorScore, TensorSums, moving_pixels
from lowvram.compare.result import Comparison, StagePair
from lowvram.compare.sources import BlockDump, Dump, Frames, Source, Stage, Video, open_source
from lowvram_kernels.errors import InputError

# Settings that change what is computed: with one of them different, a difference says nothing about the weights.
_SETTINGS = (
    "base_seed", "size", "prompt", "infer_frames", "sample_steps", "cond_rope_distance", "image", "audio", "upscale",
    "audio_track", "audio_start", "audio_duration",
)  # fmt: skip
_FILES = ("image", "audio")
Tensors = Dump | BlockDump


def compare(a: str | Path, b: str | Path) -> Comparison:
    """Compare two dumps (.safetensors), videos (.mp4) or run reports (.json); ``b`` is the baseline.

    Frames come from both dumps where both have them, else from both videos, else from what each side has.

    Raises:
        InputError: a file that is missing, damaged or of another kind; tensors or frames of different sizes, lengths or
            rates; nothing in common; NaN or infinity in a dump.
    """
    left, right = open_source(Path(a)), open_source(Path(b))
    warnings = list(_setting_warnings(left, right))
    latents: TensorScore | None = None
    blocks: list[TensorScore] = []
    tensors: list[TensorScore] = []
    if left.dump and right.dump:
        latents, blocks = _compare_blocks(left.dump, right.dump)
        tensors = _compare_tensors(left.dump, right.dump)
        warnings += _name_warnings(left.dump, right.dump)
    frames: list[FrameScore] = []
    pair = _frame_pair(left, right)
    if pair:
        _check_frames(*pair)
        frames = list(_score_frames(*pair))
        warnings += _frame_warnings(*pair, compared=len(frames))
    stages = _pair_stages(left.stages, right.stages)
    if not (blocks or tensors or frames or stages):
        raise InputError(
            f"{left.path} is {left.describe()}, {right.path} is {right.describe()}: they have nothing in common; "
            "expected two dumps, two videos, two reports, or dumps with frames"
        )
    return Comparison(
        left=left,
        right=right,
        pictures=pair,
        warnings=tuple(warnings),
        latents=latents,
        blocks=tuple(blocks),
        tensors=tuple(tensors),
        frames=tuple(frames),
        stages=tuple(stages),
    )


def _compare_blocks(a: Tensors, b: Tensors) -> tuple[TensorScore | None, list[TensorScore]]:
    shapes, expected = a.block_shapes(), b.block_shapes()
    if not shapes or not expected:
        return None, []
    if shapes != expected:
        raise InputError(
            f"{a.path} has latents of blocks {_blocks_text(shapes)}, {b.path} of {_blocks_text(expected)}: they are of "
            "different runs; make both with the same size, infer_frames and num_clip"
        )
    total, scores = TensorSums(), []
    for index in range(len(shapes)):
        sums = _sums(f"latents of block {index}", a, b, [(a.block(index), b.block(index))])
        total.merge(sums)
        scores.append(sums.score(f"block {index}"))
    return total.score("latents"), scores


def _compare_tensors(a: Tensors, b: Tensors) -> list[TensorScore]:
    scores = []
    for name in (name for name in a.other_names() if name in b.shapes):
        if a.shapes[name] != b.shapes[name]:
            raise InputError(
                f"{name} is {list(a.shapes[name])} in {a.path} and {list(b.shapes[name])} in {b.path}: they are of "
                "different runs; make both with the same prompt, audio, size and length"
            )
        pieces = zip(a.pieces(name), b.pieces(name), strict=True)
        scores.append(_sums(name, a, b, pieces).score(name))
    return scores


def _sums(name: str, a: Tensors, b: Tensors, pieces: Iterable[tuple[Any, Any]]) -> TensorSums:
    sums = TensorSums()
    for piece in pieces:
        try:
            sums.add(*piece)
        except ValueError as error:
            raise InputError(f"{name} in {a.path} or {b.path}: {error}; one of the runs went wrong") from error
    return sums


def _frame_pair(a: Source, b: Source) -> tuple[Frames, Frames] | None:
    """Like with like first: a video's coding would drown what the weights did."""
    dumped = [side.dump.frames() if side.dump else None for side in (a, b)]
    coded = [side.video.frames() if side.video else None for side in (a, b)]
    best = dumped if all(dumped) or not all(coded) else coded
    left, right = (one or other for one, other in zip(best, coded, strict=True))
    return (left, right) if left and right else None


def _check_frames(a: Frames, b: Frames) -> None:
    if (a.height, a.width) != (b.height, b.width):
        raise InputError(
            f"{a.source.path} has frames of {a.width}x{a.height}, {b.source.path} of {b.width}x{b.height}; "
            "make both of one size"
        )
    if a.fps != b.fps:
        raise InputError(
            f"{a.source.path} has {a.fps:g} frames a second, {b.source.path} {b.fps:g}; make both at one rate"
        )
    if a.count != b.count:
        raise InputError(
            f"{a.source.path} has {a.count} frames, {b.source.path} {b.count}; make both of one length, with the same "
            "voice and num_clip"
        )


def _score_frames(a: Frames, b: Frames) -> Iterator[FrameScore]:
    scorer = FrameScorer(b.fps, moving_pixels(b.source.read()))
    with contextlib.ExitStack() as stack:
        left, right = (stack.enter_context(contextlib.closing(frames.source.read())) for frames in (a, b))
        for candidate, baseline in zip(left, right, strict=False):
            yield scorer.score(candidate, baseline)


def _frame_warnings(a: Frames, b: Frames, *, compared: int) -> Iterator[str]:
    if max(a.count, b.count) != compared:
        yield f"a video breaks off: only the first {compared} of {b.count} frames are compared"
    if type(a.source) is not type(b.source):
        which = a if isinstance(a.source, Video) else b
        yield f"frames of {which.source.path.name} went through video coding, the others did not"


def _name_warnings(a: Tensors, b: Tensors) -> Iterator[str]:
    for one, other in ((a, b), (b, a)):
        only = [name for name in one.other_names() if name not in other.shapes]
        if bool(one.block_shapes()) > bool(other.block_shapes()):
            only.append("latents")
        if only:
            yield f"only {one.path.name} has {', '.join(only)}"


def _setting_warnings(a: Source, b: Source) -> Iterator[str]:
    for name in _SETTINGS:
        if name in a.settings and name in b.settings:
            # A dump keeps its settings as text. A file may have moved: its name is what counts.
            ours, theirs = (str(side.settings[name]) for side in (a, b))
            if name in _FILES:
                ours, theirs = Path(ours).name, Path(theirs).name
            if ours != theirs:
                yield f"{name} is {ours!r} against {theirs!r}: the two were not made from the same settings"


def _pair_stages(a: tuple[Stage, ...], b: tuple[Stage, ...]) -> list[StagePair]:
    if not a or not b:
        return []
    ours, theirs = ({stage.name: stage for stage in stages} for stages in (a, b))
    return [StagePair(name=name, a=ours.get(name), b=theirs.get(name)) for name in ours | theirs]


def _blocks_text(shapes: list[tuple[int, ...]]) -> str:
    groups = [(shape, len(list(run))) for shape, run in itertools.groupby(shapes)]
    return ", ".join(f"{count} x {list(shape)}" for shape, count in groups)
