"""A candidate run and scored: freely, by what is seen, and teacher-forced, step by step; its VAE and its KV rings, each
alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lowvram.compare.block_files import BlockRecorder, TrajectoryFiles
from lowvram.compare.comparison import compare
from lowvram.compare.reference import Reference
from lowvram.compare.result import Comparison
from lowvram.compare.ring_errors import ring_errors
from lowvram.compare.same_model import check_model
from lowvram.compare.sources import REFERENCE
from lowvram.compare.teacher_forcing import Forced, force
from lowvram.compare.vae_errors import Likeness, portrait_there_and_back, vae_errors
from lowvram.infer import Watching, infer, write_json
from lowvram.outputs import Outputs
from lowvram.pipeline import AvatarPipeline, Request
from lowvram_kernels.errors import ConfigError, OutOfMemoryError
from lowvram_quantize.claims import reading

TEACHER_FORCED_BLOCKS = 8
"""So many of two models that are both run, where nobody says how many: about 4 s of video, denoised once more."""


def score(
    candidate: AvatarPipeline,
    reference: Reference,
    outputs: Outputs,
    scratch: Path,
    *,
    online_decode: bool = True,
    blocks: int | None = None,
    quiet: bool = False,
) -> Comparison:
    """Let the candidate make the reference's video, which goes with its report where ``outputs`` says, and take its
    steps, those of the first ``blocks`` or of all; then look at its VAE and its rings, each alone. What else is made
    lies in ``scratch``.

    Raises:
        InputError: another model than the baseline; NaN or infinity in what it makes.
        LowvramError: as of ``infer``.
    """
    check_model(candidate.runtime.artifact, reference.facts["artifact"]["dit"], f"the reference {reference.path}")
    request = dataclasses.replace(reference.request, online_decode=online_decode)
    kept = scratch / "blocks"
    kept.mkdir()
    with reading(reference.path / REFERENCE):
        watching = Watching(recorder=lambda: BlockRecorder(kept), kept=kept)
        report = infer(candidate, request, outputs, quiet=quiet, watching=watching)
        forced = force(candidate, request, reference, blocks=blocks, quiet=quiet)
        found = _each_alone(
            compare(_report(outputs), reference.report), candidate, request, forced, reference.portrait, quiet=quiet
        )
        write_json(_report(outputs), report | {"dump_tensors": None})  # what is scratch will not be there
        return found


def score_pair(
    candidate: AvatarPipeline,
    baseline: AvatarPipeline,
    request: Request,
    places: tuple[Outputs, Outputs],
    scratch: Path,
    *,
    blocks: int = TEACHER_FORCED_BLOCKS,
    quiet: bool = False,
) -> Comparison:
    """Let both make a video, with dump and report where ``places`` say, the candidate's first; and let the candidate
    take the first ``blocks`` again as the baseline took them, which are kept in ``scratch`` meanwhile; then look at its
    VAE and its rings, each alone.

    Raises:
        InputError: they are of different models.
        OutOfMemoryError: one of them lost quality where memory ran out.
        LowvramError: as of ``infer`` and ``force``.
    """
    known = baseline.runtime.artifact
    check_model(candidate.runtime.artifact, known.component("dit").config, f"the baseline {known.path}")
    mine, theirs = places
    trajectories = TrajectoryFiles(scratch, limit=blocks)
    watching = Watching(begun=trajectories.watcher.begun)
    _check_whole("baseline", infer(baseline, request, theirs, quiet=quiet, watching=watching))
    _check_whole("candidate", infer(candidate, request, mine, quiet=quiet))
    portrait = portrait_there_and_back(baseline, request)
    forced = force(candidate, request, trajectories, quiet=quiet)
    found = compare(_report(mine), _report(theirs))
    return _each_alone(found, candidate, request, forced, portrait, quiet=quiet)


def _each_alone(
    found: Comparison,
    candidate: AvatarPipeline,
    request: Request,
    forced: Forced,
    baseline_portrait: Likeness | None,
    *,
    quiet: bool,
) -> Comparison:
    """The comparison with single steps, and with what the candidate's VAE and its rings do by themselves. Where rings
    that lose nothing have no room, nothing is known of what its own lose, which is said."""
    vae = vae_errors(candidate, found.right, request, baseline_portrait, quiet=quiet)
    rings, warnings = None, found.warnings
    try:
        rings = ring_errors(candidate, request, quiet=quiet)
    except OutOfMemoryError as error:
        warnings += (f"what 8-bit KV rings lose was not measured, since those that lose nothing do not fit: {error}",)
    return dataclasses.replace(found, forced=forced, vae=vae, rings=rings, warnings=warnings)


def _check_whole(which: str, report: dict[str, Any]) -> None:
    if lost := report["quality_lost"]:
        raise OutOfMemoryError(
            f"memory ran out, and the {which} was made with {', '.join(lost)}: two videos of different requests cannot "
            "be compared; ask for as much of both"
        )


def _report(outputs: Outputs) -> Path:
    if outputs.report is None:
        raise ConfigError("a run that is compared leaves a report; expected a place for it")
    return outputs.report
