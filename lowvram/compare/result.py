"""The result of a comparison: every score, the single figures, what was asked of them, and all of it as JSON."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.compare.metrics import FrameScore, TensorScore, mean_psnr
from lowvram.compare.sources import Frames, Source, Stage
from lowvram_kernels.errors import ConfigError
from lowvram_quantize.slabs import sha256_file

if TYPE_CHECKING:
    from lowvram.compare.ring_errors import RingErrors
    from lowvram.compare.teacher_forcing import Forced
    from lowvram.compare.vae_errors import VaeErrors

LOWER_BOUNDS = (
    "psnr", "psnr_min", "moving_psnr", "ssim", "ssim_min", "cosine", "velocity_cosine", "vae_psnr", "vae_psnr_min",
    "vae_ssim", "vae_ssim_min", "vae_portrait_psnr", "vae_portrait_ssim",
)  # fmt: skip
UPPER_BOUNDS = (
    "flicker", "latent_error", "latent_error_max", "velocity_error", "velocity_error_first", "velocity_error_max",
    "token_error_mean", "token_error_median", "token_error_p99", "token_error_p999", "token_error_maximum",
    "teacher_forced_latent_error", "ring_velocity_error", "ring_attention_error", "ring_attention_error_max",
    "ring_key_error", "ring_value_error",
)  # fmt: skip
"""What ``--fail-under`` can hold a run to; see ``Comparison.values``. Of errors the bound is an upper one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePair:
    """A stage of both runs; None where a run does not have it."""

    name: str
    a: Stage | None
    b: Stage | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold:
    """What a figure was to be at the least, or at the most where ``upper``."""

    metric: str
    value: float
    bound: float
    upper: bool

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.upper else self.value >= self.bound


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Candidate ``left`` against baseline ``right``.

    ``latents`` are all blocks taken together, ``blocks`` each one; ``tensors`` what else both dumps have; ``frames``
    every frame of ``pictures``, candidate and baseline; ``forced`` the candidate's teacher-forced steps, ``vae`` its
    VAE alone and ``rings`` its 8-bit KV rings alone, of which finished runs say nothing.
    What the two do not have in common is empty.
    """

    left: Source
    right: Source
    pictures: tuple[Frames, Frames] | None
    warnings: tuple[str, ...]
    latents: TensorScore | None
    blocks: tuple[TensorScore, ...]
    tensors: tuple[TensorScore, ...]
    frames: tuple[FrameScore, ...]
    stages: tuple[StagePair, ...]
    forced: Forced | None = None
    vae: VaeErrors | None = None
    rings: RingErrors | None = None

    @property
    def a(self) -> Path:
        """What was named as the candidate."""
        return self.left.path

    @property
    def b(self) -> Path:
        """What was named as the baseline."""
        return self.right.path

    @functools.cached_property
    def files(self) -> dict[str, list[dict[str, Any]]]:
        """Path, bytes and SHA-256 of every file that was compared, of ``a`` and of ``b``; read when first asked for."""
        return {"a": _files(self.left), "b": _files(self.right)}

    @property
    def worst_frame(self) -> FrameScore | None:
        """The frame of the lowest PSNR; None without frames or where all are identical."""
        differing = [frame for frame in self.frames if math.isfinite(frame.psnr)]
        return min(differing, key=lambda frame: frame.psnr, default=None)

    @property
    def values(self) -> dict[str, float]:
        """The single figures, of what was compared.

        ``psnr`` is the mean over the frames that differ (infinite where none does), ``psnr_min`` the worst frame's;
        ``moving_psnr`` the mean where the baseline moves most; ``ssim`` and ``ssim_min`` mean and worst over all
        frames; ``flicker`` the mean in levels of 255; ``cosine`` the lowest of any block; ``latent_error`` the relative
        error of all latents together, ``latent_error_max`` that of the worst block. Of a teacher-forced candidate
        ``Forced.values`` too, whose latents' error is ``teacher_forced_latent_error``; ``VaeErrors.values`` and
        ``RingErrors.values``.
        """
        found: dict[str, float] = {}
        if self.frames:
            ssims = [frame.ssim for frame in self.frames]
            found["psnr"] = mean_psnr(frame.psnr for frame in self.frames)
            found["psnr_min"] = min(frame.psnr for frame in self.frames)
            found["moving_psnr"] = mean_psnr(frame.moving_psnr for frame in self.frames)
            found["ssim"], found["ssim_min"] = sum(ssims) / len(ssims), min(ssims)
            found["flicker"] = sum(frame.flicker for frame in self.frames) / len(ssims)
        if self.latents:
            found["cosine"] = min(block.cosine for block in self.blocks)
            found["latent_error"] = self.latents.relative_error
            found["latent_error_max"] = max(block.relative_error for block in self.blocks)
        if self.forced:
            forced = self.forced.values
            found |= {"teacher_forced_latent_error": forced.pop("latent_error"), **forced}
        for part in (self.vae, self.rings):
            found |= part.values if part else {}
        return found

    def check(self, bounds: Mapping[str, float]) -> list[str]:
        """Which bounds are missed, a line each: figures that are too low, errors that are too high.

        Raises:
            ConfigError: a bound on something that the two inputs do not have in common.
        """
        missed = [each for each in self.thresholds(bounds) if not each.met]
        return [
            f"{each.metric} is {each.value:.6g}, {'above' if each.upper else 'under'} {each.bound:g}" for each in missed
        ]

    def thresholds(self, bounds: Mapping[str, float]) -> list[Threshold]:
        """Each bound beside the figure that it is of.

        Raises:
            ConfigError: as of ``check``.
        """
        values = self.values
        if absent := [name for name in bounds if name not in values]:
            raise ConfigError(
                f"--fail-under names {', '.join(absent)}, but {self.a} and {self.b} give "
                f"{', '.join(values) or 'no figures'}; compare files that hold both, or run what is compared (--model) "
                "for figures of single steps, the VAE and 8-bit KV rings"
            )
        return [
            Threshold(metric=name, value=values[name], bound=bound, upper=name in UPPER_BOUNDS)
            for name, bound in bounds.items()
        ]

    def to_json(self, bounds: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Everything, with infinity as the string "inf": strict JSON has no number for it. With ``files``, for which
        all of them are read once more.

        Raises:
            ConfigError: as of ``check``.
        """
        worst = self.worst_frame
        value = {
            "a": str(self.a),
            "b": str(self.b),
            "warnings": list(self.warnings),
            "values": self.values,
            "thresholds": [dataclasses.asdict(t) | {"met": t.met} for t in self.thresholds(bounds or {})],
            "settings": {"a": self.left.settings, "b": self.right.settings},
            "files": self.files,
            "blocks": [{"block": i, **_score(block)} for i, block in enumerate(self.blocks)],
            "tensors": {score.name: _score(score) for score in self.tensors},
            "frames": [dataclasses.asdict(frame) for frame in self.frames],
            "identical_frames": sum(math.isinf(frame.psnr) for frame in self.frames),
            "worst_frame": dataclasses.asdict(worst) if worst else None,
            "stages": [_stage_json(pair) for pair in self.stages],
            "runs": {"a": self.left.run, "b": self.right.run},
            "teacher_forced": self.forced.to_json() if self.forced else None,
            "vae": self.vae.to_json() if self.vae else None,
            "rings": self.rings.to_json() if self.rings else None,
        }
        return dict(_strict(value))


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


def _score(score: TensorScore) -> dict[str, float]:
    return {"relative_error": score.relative_error, "cosine": score.cosine}


def _files(source: Source) -> list[dict[str, Any]]:
    return [{"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in source.files]


def _stage_json(pair: StagePair) -> dict[str, Any]:
    sides = {"a": pair.a, "b": pair.b}
    facts = {f"{key}_{side}": getattr(s, key, None) for key in ("seconds", "peak_bytes") for side, s in sides.items()}
    return {"name": pair.name, **facts}


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
