"""What ``convert --measure-on`` runs: an artifact in bf16 beside what it was made from, and units of Linears."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowvram_quantize.allocation import Budget
from lowvram_quantize.format import Artifact
from lowvram_quantize.original import Original, original_as
from lowvram_quantize.publish import check_target
from lowvram_quantize.units import units_of

IN_EVERY_STEP = ("blocks.", "audio_injector.")


def to_be_measured(path: Path, options: Mapping[str, Any]) -> tuple[Artifact, Original, dict[str, list[str]]]:
    """The artifact in ``path``, its source as ``options`` of ``convert`` name it, and by unit the weights of Linears
    that run in every step.

    Raises:
        CheckpointError: no artifact, or one of another source.
        ConfigError: options that ``convert`` would refuse once all is measured.
        InputError: likewise.
    """
    Budget(target_bytes=options["target_bytes"], max_error=options["max_error"])
    check_target(options["out"], overwrite=options["overwrite"])
    artifact, original = Artifact.open(path), original_as(options)
    original.check(artifact)
    units = {unit: [item.name for item in items] for unit, items in units_of(original.plan.items).items()}
    return artifact, original, {unit: names for unit, names in units.items() if unit.startswith(IN_EVERY_STEP)}
