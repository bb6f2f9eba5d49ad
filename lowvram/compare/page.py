"""A comparison as one HTML page that holds everything in itself and asks the network for nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from lowvram.compare.charts import Chart, over_count, over_time
from lowvram.compare.pictures import LONGEST_S, make_clip, make_stills
from lowvram.compare.result import Comparison
from lowvram.media.contact_sheet import AMPLIFIED
from lowvram_kernels.errors import OutputError

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
)


def write_page(comparison: Comparison, path: Path, bounds: Mapping[str, float] | None = None) -> None:
    """Write the page to ``path``, which may be replaced: key figures with what ``bounds`` ask of them, clips and stills
    of both runs and their difference, curves, blocks, stages, settings and checksums. The JSON of ``to_json`` is in it.

    Raises:
        ConfigError: as of ``Comparison.check``.
        OutputError: a full disk, or no right to write there.
    """
    text = render(comparison, bounds)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}), {len(text)} bytes: free some space, or choose "
            "another place"
        ) from error


def render(comparison: Comparison, bounds: Mapping[str, float] | None = None) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"seconds": _seconds, "mib": _mib}
    facts = comparison.to_json(bounds)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        json=_for_script(facts),
        figures=_figures(comparison),
        charts=_charts(comparison),
        clip=make_clip(comparison),
        stills=make_stills(comparison),
        amplified=AMPLIFIED,
        longest_s=LONGEST_S,
        settings=_settings(comparison),
        candidate=comparison.a.name,
        baseline=comparison.b.name,
        thresholds=comparison.thresholds(bounds or {}),
    )


def _figures(comparison: Comparison) -> list[tuple[str, str, str]]:
    values = comparison.values
    return [
        (label, "identical" if math.isinf(values[name]) else format(values[name], form), unit)
        for name, label, unit, form in _FIGURES
        if name in values
    ]


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
        errors = [block.relative_error for block in comparison.blocks]
        charts.append(over_count("Latents, relative error by block", "", errors, "block"))
    return charts


def _settings(comparison: Comparison) -> list[tuple[str, str, str]]:
    ours, theirs = comparison.left.settings, comparison.right.settings
    return [(name, str(ours.get(name, "")), str(theirs.get(name, ""))) for name in dict.fromkeys([*ours, *theirs])]


def _for_script(facts: dict[str, Any]) -> str:
    """JSON that can stand in a <script>: no path or prompt in it can end the element."""
    return json.dumps(facts, indent=1, allow_nan=False).replace("<", "\\u003c")


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f}"
