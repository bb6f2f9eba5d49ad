"""A comparison as tables on a console."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowvram.compare import part_rows, teacher_forced_rows
from lowvram.compare.metrics import FrameScore, TensorScore, mean_psnr
from lowvram.compare.part_rows import decibels
from lowvram.compare.token_errors import UNCERTAINTY

if TYPE_CHECKING:
    from lowvram.compare.result import Comparison, StagePair
    from lowvram.compare.sources import Stage
    from lowvram.compare.teacher_forcing import Forced

# Up to this many frames each has a row; more are shown a second at a time, at 25 frames a second.
_ROWS = 30
_FRAMES_A_ROW = 25


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print latents, tensors, frames, teacher-forced steps, the VAE and the KV rings alone and stages, each where there
    are any, then the summary and the warnings."""
    console.print(Text(f"{comparison.a} against the baseline {comparison.b}"), soft_wrap=True)
    for title, scores in (("Latents", comparison.blocks), ("Other tensors", comparison.tensors)):
        if scores:
            console.print(_tensor_table(title, scores))
    if comparison.frames:
        console.print(_frame_table(comparison.frames))
    if comparison.forced:
        for table in _teacher_forced_tables(comparison.forced):
            console.print(table)
    for table in _tables_of_parts(comparison):
        console.print(table)
    if comparison.stages:
        console.print(_stage_table(comparison.stages))
    for line in _summary(comparison):
        console.print(Text(line), soft_wrap=True)
    for warning in comparison.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)


def _tensor_table(title: str, scores: tuple[TensorScore, ...]) -> Table:
    table = _table(title, "", "relative error", "cosine")
    for score in scores:
        table.add_row(score.name, f"{score.relative_error:.3e}", f"{score.cosine:.7f}")
    return table


def _frame_table(frames: tuple[FrameScore, ...]) -> Table:
    if len(frames) <= _ROWS:
        table = _table("Frames", "frame", "time", "PSNR dB", "SSIM")
        for frame in frames:
            table.add_row(str(frame.index), f"{frame.time_s:.2f} s", decibels(frame.psnr), f"{frame.ssim:.5f}")
        return table
    table = _table("Frames", "frames", "time", "PSNR dB", "lowest", "SSIM", "lowest")
    for start in range(0, len(frames), _FRAMES_A_ROW):
        run = frames[start : start + _FRAMES_A_ROW]
        ssims = [frame.ssim for frame in run]
        table.add_row(
            f"{run[0].index} to {run[-1].index}",
            f"{run[0].time_s:.2f} s",
            decibels(mean_psnr(frame.psnr for frame in run)),
            decibels(min(frame.psnr for frame in run)),
            f"{sum(ssims) / len(ssims):.5f}",
            f"{min(ssims):.5f}",
        )
    return table


def _teacher_forced_tables(forced: Forced) -> list[Table]:
    title = "Velocities of single steps from the baseline's latents: relative error in %, of all and of single tokens"
    velocities = _filled(title, teacher_forced_rows.COLUMNS, teacher_forced_rows.narrow_rows(forced))
    if forced.layers is None:
        return [velocities]
    names = [f"step {step}" for step in range(len(forced.layers_by_step))]
    columns = ("", "all steps", "added", *names)
    return [velocities, _filled("Error behind each layer", columns, teacher_forced_rows.layer_rows(forced))]


def _tables_of_parts(comparison: Comparison) -> list[Table]:
    vae, rings, found = comparison.vae, comparison.rings, []
    if vae:
        found.append(_filled("VAE alone", part_rows.VAE_COLUMNS, part_rows.vae_rows(vae)))
    if rings:
        found.append(_filled("KV rings alone: relative error", part_rows.RING_COLUMNS, part_rows.ring_rows(rings)))
    return found


def _filled(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = _table(title, *columns)
    for row in rows:
        table.add_row(*row)
    return table


def _stage_table(stages: tuple[StagePair, ...]) -> Table:
    table = _table("Stages", "", "seconds", "baseline", "peak MiB", "baseline")
    seconds: Callable[[Stage], str] = lambda s: "" if s.seconds is None else f"{s.seconds:.2f}"  # noqa: E731
    peak: Callable[[Stage], str] = lambda s: "" if s.peak_bytes is None else f"{s.peak_bytes / 2**20:.0f}"  # noqa: E731
    for pair in stages:
        cells = [show(side) if side else "" for show, side in itertools.product((seconds, peak), (pair.a, pair.b))]
        table.add_row(pair.name, *cells)
    return table


def _summary(comparison: Comparison) -> list[str]:
    values, lines = comparison.values, []
    if comparison.latents:
        lines.append(
            f"latents: relative error {values['latent_error']:.3e}, worst block {values['latent_error_max']:.3e}, "
            f"lowest cosine {values['cosine']:.7f}"
        )
    if comparison.frames:
        lines.append(
            f"frames: {len(comparison.frames)} compared, PSNR {decibels(values['psnr'])} dB, "
            f"lowest {decibels(values['psnr_min'])} dB, SSIM {values['ssim']:.5f}, lowest {values['ssim_min']:.5f}; "
            f"PSNR {decibels(values['moving_psnr'])} dB where the baseline moves most, flicker "
            f"{values['flicker']:.3f} of 255"
        )
        worst = comparison.worst_frame
        if worst:
            quality = f"PSNR {decibels(worst.psnr)} dB, SSIM {worst.ssim:.5f}"
            lines.append(f"worst frame: {worst.index} at {worst.time_s:.2f} s, {quality}")
        else:
            lines.append("all frames are identical")
    if comparison.forced:
        lines.append(
            f"teacher-forced: relative error of velocities {values['velocity_error']:.3e}, worst block "
            f"{values['velocity_error_max']:.3e}; {teacher_forced_rows.summary(comparison.forced)}"
        )
        if teacher_forced_rows.is_uncertain(comparison.forced):
            lines.append(f"±: {UNCERTAINTY}")
    if comparison.vae:
        lines.append(f"VAE alone: {part_rows.vae_summary(comparison.vae)}")
    if comparison.rings:
        lines.append(f"KV rings alone: {part_rows.ring_summary(comparison.rings)}")
    return lines


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table
