"""Compare two runs of the same seed: latents block by block, frames by PSNR and SSIM, stages by seconds and bytes.

The first of the two is the candidate, the second the baseline it is measured against.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lowvram.compare.metrics import FrameScore, TensorScore, TensorSums, mean_psnr, score_frame
from lowvram.compare.sources import Dump, Frames, Source, Stage, Video, open_source
from lowvram_kernels.errors import ConfigError, InputError

LOWER_BOUNDS = ("psnr", "psnr_min", "ssim", "ssim_min", "cosine")
UPPER_BOUNDS = ("latent_error", "latent_error_max")
"""What ``--fail-under`` can hold a run to; see ``Comparison.values``. Of errors the bound is an upper one."""

# Settings that change what is computed: with one of them different, a difference says nothing about the weights.
_SETTINGS = (
    "base_seed", "size", "prompt", "infer_frames", "sample_steps", "cond_rope_distance", "image", "audio", "upscale",
    "audio_track", "audio_start", "audio_duration",
)  # fmt: skip
_FILES = ("image", "audio")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePair:
    """A stage of both runs; None where a run does not have it."""

    name: str
    a: Stage | None
    b: Stage | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Candidate ``a`` against baseline ``b``.

    ``latents`` are all blocks taken together, ``blocks`` each one; ``tensors`` what else both dumps have; ``frames``
    every frame. What the two do not have in common is empty.
    """

    a: Path
    b: Path
    warnings: tuple[str, ...]
    latents: TensorScore | None
    blocks: tuple[TensorScore, ...]
    tensors: tuple[TensorScore, ...]
    frames: tuple[FrameScore, ...]
    stages: tuple[StagePair, ...]

    @property
    def worst_frame(self) -> FrameScore | None:
        """The frame of the lowest PSNR; None without frames or where all are identical."""
        differing = [frame for frame in self.frames if math.isfinite(frame.psnr)]
        return min(differing, key=lambda frame: frame.psnr, default=None)

    @property
    def values(self) -> dict[str, float]:
        """The single figures, of what was compared.

        ``psnr`` is the mean over the frames that differ (infinite where none does), ``psnr_min`` the worst frame's;
        ``ssim`` and ``ssim_min`` mean and worst over all frames; ``cosine`` the lowest of any block; ``latent_error``
        the relative error of all latents together, ``latent_error_max`` that of the worst block.
        """
        found: dict[str, float] = {}
        if self.frames:
            ssims = [frame.ssim for frame in self.frames]
            found["psnr"] = mean_psnr(self.frames)
            found["psnr_min"] = min(frame.psnr for frame in self.frames)
            found["ssim"], found["ssim_min"] = sum(ssims) / len(ssims), min(ssims)
        if self.latents:
            found["cosine"] = min(block.cosine for block in self.blocks)
            found["latent_error"] = self.latents.relative_error
            found["latent_error_max"] = max(block.relative_error for block in self.blocks)
        return found

    def check(self, bounds: Mapping[str, float]) -> list[str]:
        """Which bounds are missed, a line each: figures that are too low, errors that are too high.

        Raises:
            ConfigError: a bound on something that the two inputs do not have in common.
        """
        values = self.values
        if absent := [name for name in bounds if name not in values]:
            raise ConfigError(
                f"--fail-under names {', '.join(absent)}, but {self.a} and {self.b} give "
                f"{', '.join(values) or 'no figures'}; compare files that hold both"
            )
        missed = []
        for name, bound in bounds.items():
            if name in UPPER_BOUNDS and not values[name] <= bound:
                missed.append(f"{name} is {values[name]:.6g}, above {bound:g}")
            elif name in LOWER_BOUNDS and not values[name] >= bound:
                missed.append(f"{name} is {values[name]:.6g}, under {bound:g}")
        return missed

    def to_json(self) -> dict[str, Any]:
        """Everything, with infinity as the string "inf": strict JSON has no number for it."""
        worst = self.worst_frame
        value = {
            "a": str(self.a),
            "b": str(self.b),
            "warnings": list(self.warnings),
            "values": self.values,
            "blocks": [{"block": i, **_score(block)} for i, block in enumerate(self.blocks)],
            "tensors": {score.name: _score(score) for score in self.tensors},
            "frames": [dataclasses.asdict(frame) for frame in self.frames],
            "identical_frames": sum(math.isinf(frame.psnr) for frame in self.frames),
            "worst_frame": dataclasses.asdict(worst) if worst else None,
            "stages": [_stage_json(pair) for pair in self.stages],
        }
        return dict(_strict(value))


def compare(a: str | Path, b: str | Path) -> Comparison:
    """Compare two dumps (.safetensors), videos (.mp4) or run reports (.json); ``b`` is the baseline.

    Frames come from both dumps where both have them, else from both videos, else from what each side has. Videos of
    different length are compared as far as both go, with a warning.

    Raises:
        InputError: a file that is missing, damaged or of another kind; tensors or frames of different sizes; nothing
            in common; NaN or infinity in a dump.
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
    if pair := _frame_pair(left, right):
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
        a=left.path,
        b=right.path,
        warnings=tuple(warnings),
        latents=latents,
        blocks=tuple(blocks),
        tensors=tuple(tensors),
        frames=tuple(frames),
        stages=tuple(stages),
    )


def parse_fail_under(texts: Iterable[str]) -> dict[str, float]:
    """``["psnr=30", "latent_error=0.01"]`` -> bounds for ``Comparison.check``.

    Raises:
        ConfigError: no METRIC=NUMBER, an unknown metric, or one named twice.
    """
    bounds: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        name = name.strip()
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if math.isnan(bound):
            raise ConfigError(f"--fail-under is {text!r}; expected METRIC=NUMBER, as psnr=30")
        if name not in LOWER_BOUNDS + UPPER_BOUNDS:
            raise ConfigError(f"--fail-under names {name!r}; known are {', '.join(LOWER_BOUNDS + UPPER_BOUNDS)}")
        if name in bounds:
            raise ConfigError(f"--fail-under names {name} twice; give one bound")
        bounds[name] = bound
    return bounds


def _compare_blocks(a: Dump, b: Dump) -> tuple[TensorScore | None, list[TensorScore]]:
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


def _compare_tensors(a: Dump, b: Dump) -> list[TensorScore]:
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


def _sums(name: str, a: Dump, b: Dump, pieces: Iterable[tuple[Any, Any]]) -> TensorSums:
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
    both_dumps = isinstance(a.source, Dump) and isinstance(b.source, Dump)
    if both_dumps and a.count != b.count:
        raise InputError(f"{a.source.path} has {a.count} frames, {b.source.path} {b.count}; make both of one length")


def _score_frames(a: Frames, b: Frames) -> Iterator[FrameScore]:
    with contextlib.ExitStack() as stack:
        left, right = (stack.enter_context(contextlib.closing(frames.source.read())) for frames in (a, b))
        for index, (candidate, baseline) in enumerate(zip(left, right, strict=False)):
            yield score_frame(index, b.fps, candidate, baseline)


def _frame_warnings(a: Frames, b: Frames, *, compared: int) -> Iterator[str]:
    if max(a.count, b.count) != compared:
        yield f"{a.count} frames against {b.count}: only the first {compared} are compared"
    if a.fps != b.fps:
        yield f"{a.fps:g} frames a second against {b.fps:g}: frames are compared by number, not by time"
    if type(a.source) is not type(b.source):
        which = a if isinstance(a.source, Video) else b
        yield f"frames of {which.source.path.name} went through video coding, the others did not"


def _name_warnings(a: Dump, b: Dump) -> Iterator[str]:
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


def _score(score: TensorScore) -> dict[str, float]:
    return {"relative_error": score.relative_error, "cosine": score.cosine}


def _stage_json(pair: StagePair) -> dict[str, Any]:
    sides = {"a": pair.a, "b": pair.b}
    facts = {f"{key}_{side}": getattr(s, key, None) for key in ("seconds", "peak_bytes") for side, s in sides.items()}
    return {"name": pair.name, **facts}


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
