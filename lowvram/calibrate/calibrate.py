"""Calibration of an artifact: what a manifest says of the errors at the outputs of the DiT's Linears."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from lowvram.calibrate.inputs import CalibrationInputs
from lowvram.calibrate.measure import LinearError, Source, measure
from lowvram.devices import choose_device, choose_dtype
from lowvram.offload.placement import MemoryOptions
from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.format import Artifact

Tensor = torch.Tensor
_PARTS = ("dit", "vae", "text_encoder")
_FOLDERS = ("audio_encoder", "tokenizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated:
    """``facts``: what the manifest is to say, settings, and for each Linear its relative error and its activations;
    ``channel_rms`` the root mean square of each input channel [K], by weight."""

    facts: dict[str, Any]
    channel_rms: dict[str, Tensor]


def calibrate(
    artifact: Artifact,
    source: Source,
    given: CalibrationInputs,
    *,
    device: str = "auto",
    memory: MemoryOptions | None = None,
    quiet: bool = False,
) -> Calibrated:
    """Run the artifact on ``given`` and compare each Linear's output with that of the source's weight, as ``measure``
    does.

    Raises:
        CheckpointError: an artifact that has no full set of components, or what ``measure`` raises.
        LowvramError: as of ``measure``.
    """
    check_whole(artifact)
    where = choose_device(device)
    found = measure(artifact, source, given.inputs, schemes=(), device=device, memory=memory, quiet=quiet)
    facts = {
        **given.facts,
        "device": where.type,
        "dtype": str(choose_dtype("auto", where)).removeprefix("torch."),
        "linears": {name: _facts(error) for name, error in found.items()},
    }
    return Calibrated(facts=facts, channel_rms={name: error.channel_rms for name, error in found.items()})


def check_whole(artifact: Artifact) -> None:
    """Raises: CheckpointError where the artifact lacks what a run needs."""
    lacking = [name for name in _PARTS if name not in artifact.manifest["components"]]
    lacking += [
        name for name in _FOLDERS if not any(file.startswith(f"{name}/") for file in artifact.manifest["files"])
    ]
    if lacking:
        raise CheckpointError(
            f"{artifact.path} has no {' and no '.join(lacking)}, and calibration runs the whole model; convert the "
            "checkpoint with all of its components"
        )


def _facts(error: LinearError) -> dict[str, Any]:
    relative = error.relative_error()
    return {
        "scheme": error.scheme,
        "rows": error.rows,
        "output_error": relative if math.isfinite(relative) else None,
        "activations": error.activations.to_json(),
    }
