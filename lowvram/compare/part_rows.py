"""What a candidate's VAE and its KV rings do, each alone, as rows of text: for a console and for a page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lowvram.compare.teacher_forced_rows import percent

if TYPE_CHECKING:
    from lowvram.compare.ring_errors import LayerRings, RingErrors
    from lowvram.compare.vae_errors import Likeness, VaeErrors

Row = tuple[str, ...]
VAE_COLUMNS = ("", "PSNR dB", "SSIM")
RING_COLUMNS = ("", "attention", "keys", "values")


def vae_rows(vae: VaeErrors) -> list[Row]:
    """The ``VAE_COLUMNS`` of the frames, mean and worst, then of the portrait."""
    values = vae.values
    rows = [
        ("frames of the baseline's latents", decibels(values["vae_psnr"]), f"{values['vae_ssim']:.5f}"),
        ("the worst of them", decibels(values["vae_psnr_min"]), f"{values['vae_ssim_min']:.5f}"),
        _row("portrait, encoded and decoded", vae.portrait),
    ]
    if vae.baseline_portrait is not None:
        rows.append(_row("the same by the baseline's VAE", vae.baseline_portrait))
    return rows


def vae_summary(vae: VaeErrors) -> str:
    """How much was decoded, in a line."""
    return f"{_first(vae.blocks, vae.of_blocks)}, {len(vae.frames)} frames, {vae.seconds:.1f} s"


def ring_rows(rings: RingErrors) -> list[Row]:
    """The ``RING_COLUMNS``: relative errors of all layers together, then of each."""
    every = [_errors(f"layer {index}", layer) for index, layer in enumerate(rings.layers)]
    return [_errors("all layers", rings.together), *every]


def ring_summary(rings: RingErrors) -> str:
    """Of what, how much, and the error of velocities, in a line."""
    steps = ", ".join(percent(step) for step in rings.by_step)
    return (
        f"rings and sink in {rings.kv} (format {rings.kv_format}) against those in the dtype that is computed in, "
        f"{_first(rings.blocks, rings.of_blocks)}, {rings.seconds:.1f} s: relative error of velocities "
        f"{percent(rings.velocity)}, by step {steps}"
    )


def decibels(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "identical"


def _row(name: str, likeness: Likeness) -> Row:
    return name, decibels(likeness.psnr), f"{likeness.ssim:.5f}"


def _errors(name: str, errors: LayerRings) -> Row:
    return name, percent(errors.attention), percent(errors.keys), percent(errors.values)


def _first(blocks: int, of: int) -> str:
    return f"all {of} blocks" if blocks == of else f"the first {blocks} of {of} blocks"
