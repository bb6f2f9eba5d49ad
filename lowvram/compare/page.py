"""A comparison as one HTML page that holds everything in itself and asks the network for nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.compare import part_rows, teacher_forced_rows
from lowvram.compare.charts import Chart, over_count, over_time
from lowvram.compare.pictures import LONGEST_S, make_clip, make_stills
from lowvram.compare.result import Comparison
from lowvram.compare.token_errors import UNCERTAINTY
from lowvram.media.contact_sheet import AMPLIFIED
from lowvram.pages.document import for_script, rendered, write_text
from lowvram_models.constants import DROPPED_FIRST_FRAMES, FRAMES_PER_LATENT

if TYPE_CHECKING:
    from lowvram.compare.teacher_forcing import Forced

_TEMPLATE = Path(__file__).with_name("page.html.j2")
# Figures in the page's head, in this order where they are there: name, label, unit, how it is written.
_FIGURES = (
    ("psnr", "PSNR", "dB", ".2f"),
    ("psnr_min", "PSNR, worst frame", "dB", ".2f"),
    ("moving_psnr", "PSNR where the baseline moves most", "dB", ".2f"),
    ("ssim", "SSIM", "", ".5f"),
    ("ssim_min", "SSIM, worst frame", "", ".5f"),
    ("flicker", "flicker", "of 255", ".4f"),
    ("latent_error", "latents, relative error", "", ".3e"),
    ("latent_error_max", "latents, worst block", "", ".3e"),
    ("cosine", "latents, lowest cosine", "", ".7f"),
    ("velocity_error", "teacher-forced: velocity, relative error", "", ".3e"),
    ("token_error_median", "teacher-forced: median of the tokens", "", ".3e"),
    ("token_error_p999", "teacher-forced: 99.9 % of the tokens", "", ".3e"),
    ("vae_psnr", "VAE alone: PSNR", "dB", ".2f"),
    ("vae_portrait_psnr", "VAE alone: portrait, PSNR", "dB", ".2f"),
    ("ring_velocity_error", "KV rings alone: velocity, relative error", "", ".3e"),
)


def write_page(comparison: Comparison, path: Path, bounds: Mapping[str, float] | None = None) -> None:
    """Write the page to ``path``, which may be replaced: key figures with what ``bounds`` ask of them, clips and stills
    of both runs and their difference, curves, blocks, teacher-forced steps and layers, the VAE and the KV rings alone,
    stages, settings and checksums. The JSON of ``to_json`` is in it.

    Raises:
        ConfigError: as of ``Comparison.check``.
        OutputError: a full disk, or no right to write there.
    """
    write_text(render(comparison, bounds), path)


def render(comparison: Comparison, bounds: Mapping[str, float] | None = None) -> str:
    """The page as text."""
    facts = comparison.to_json(bounds)
    values = dict(
        facts=facts,
        json=for_script(facts),
        figures=_figures(comparison),
        charts=_charts(comparison),
        teacher_forced=_teacher_forced(comparison.forced),
        parts=_parts(comparison),
        runs=_runs(comparison),
        whole=_whole(comparison),
        clip=make_clip(comparison),
        stills=make_stills(comparison),
        amplified=AMPLIFIED,
        longest_s=LONGEST_S,
        settings=_settings(comparison),
        candidate=comparison.a.name,
        baseline=comparison.b.name,
        thresholds=comparison.thresholds(bounds or {}),
    )
    return rendered(_TEMPLATE, values, {"seconds": _seconds, "mib": _mib})


def _figures(comparison: Comparison) -> list[tuple[str, str, str]]:
    values = comparison.values
    return [(label, _written(values[name], form, unit), unit) for name, label, unit, form in _FIGURES if name in values]


def _written(value: float, form: str, unit: str) -> str:
    """Frames without a difference have an infinite PSNR; an error is infinite where the baseline has zeros."""
    if math.isfinite(value):
        return format(value, form)
    return "identical" if unit == "dB" else "infinite"


def _charts(comparison: Comparison) -> list[Chart]:
    frames, charts = comparison.frames, []
    if frames and comparison.pictures:
        fps = comparison.pictures[1].fps
        gaps = "identical frames are gaps" if any(math.isinf(frame.psnr) for frame in frames) else ""
        charts += [
            over_time("PSNR", "dB", [f.psnr for f in frames], fps, min, gaps),
            over_time("PSNR where the baseline moves most", "dB", [f.moving_psnr for f in frames], fps, min,
                      "the tenth of the pixels that vary most: of a talking portrait mouth and eyes"),
            over_time("SSIM", "", [f.ssim for f in frames], fps, min),
            over_time("Flicker", "of 255", [f.flicker for f in frames], fps, max,
                      "by how much the difference changes from frame to frame"),
        ]  # fmt: skip
    if comparison.blocks:
        charts.append(_latents(comparison))
    return charts


def _latents(comparison: Comparison) -> Chart:
    """Over time, each block as long as it is shown; by block where no frames are."""
    title, errors = "Latents, relative error", [block.relative_error for block in comparison.blocks]
    if not (comparison.frames and comparison.pictures and comparison.right.dump):
        return over_count(title, "", errors, "block")
    lengths = [FRAMES_PER_LATENT * shape[1] for shape in comparison.right.dump.block_shapes()]
    each = [error for error, length in zip(errors, lengths, strict=True) for _ in range(length)]
    shown = each[DROPPED_FIRST_FRAMES:][: len(comparison.frames)]
    return over_time(title, "", shown, comparison.pictures[1].fps, max, "of the whole block that a frame is of")


def _teacher_forced(forced: Forced | None) -> dict[str, Any] | None:
    """Tables and charts of a teacher-forced candidate."""
    if forced is None:
        return None
    charts = [over_count("Velocities, relative error", "", [b.relative_error for b in forced.by_block], "block")]
    if forced.layers is not None:
        note = f"of sampled tokens, all steps of block{'s' if len(forced.layers_of) > 1 else ''} "
        note += " and ".join(str(block) for block in forced.layers_of)
        charts += [
            over_count("Residual stream, relative error behind each layer", "", forced.layers.relative_errors[1:],
                       "layer", note),
            over_count("What each layer adds to it", "", forced.layers.increments[1:], "layer", note),
        ]  # fmt: skip
    return {
        "columns": teacher_forced_rows.COLUMNS,
        "rows": teacher_forced_rows.rows(forced),
        "summary": teacher_forced_rows.summary(forced),
        "uncertainty": UNCERTAINTY if teacher_forced_rows.is_uncertain(forced) else "",
        "charts": charts,
        "steps": range(len(forced.layers_by_step)),
        "layers": teacher_forced_rows.layer_rows(forced),
    }


def _parts(comparison: Comparison) -> list[dict[str, Any]]:
    """Sections of what was measured apart from all else: title, what it is, table and charts."""
    found: list[dict[str, Any]] = []
    if vae := comparison.vae:
        found.append({
            "name": "vae", "title": "VAE alone",
            "text": "The candidate's decoder on the baseline's latents against the baseline's frames, and the portrait "
            f"there and back against itself, with nothing of the candidate's DiT: {part_rows.vae_summary(vae)}.",
            "columns": part_rows.VAE_COLUMNS, "rows": part_rows.vae_rows(vae), "charts": [],
        })  # fmt: skip
    if rings := comparison.rings:
        note = "of sampled tokens, with what the layers before it did"
        found.append({
            "name": "rings", "title": "KV rings alone",
            "text": f"The same artifact twice, teacher-forced: {part_rows.ring_summary(rings)}. Keys and values are as "
            "they are read against as they were written.",
            "columns": part_rows.RING_COLUMNS, "rows": part_rows.ring_rows(rings),
            "charts": [over_count("What attention gives, relative error", "", [x.attention for x in rings.layers],
                                  "layer", note)],
        })  # fmt: skip
    return found


def _runs(comparison: Comparison) -> list[tuple[str, str, str]]:
    return _side_by_side(comparison.left.run, comparison.right.run)


def _whole(comparison: Comparison) -> list[tuple[float | None, int | None]]:
    """Seconds of all stages and the highest of their peaks in bytes, of candidate and baseline."""
    found = []
    for sides in ([pair.a for pair in comparison.stages], [pair.b for pair in comparison.stages]):
        seconds = [stage.seconds for stage in sides if stage and stage.seconds is not None]
        peaks = [stage.peak_bytes for stage in sides if stage and stage.peak_bytes is not None]
        found.append((sum(seconds) if seconds else None, max(peaks, default=None)))
    return found


def _settings(comparison: Comparison) -> list[tuple[str, str, str]]:
    return _side_by_side(comparison.left.settings, comparison.right.settings)


def _side_by_side(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [(name, str(ours.get(name, "")), str(theirs.get(name, ""))) for name in dict.fromkeys([*ours, *theirs])]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f}"
