"""Activations that a calibration measured, in a file of the artifact that it ran on, where ``convert`` reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.format import CALIBRATION, Artifact
from lowvram_quantize.schemes import dit_scheme, with_smoothing
from lowvram_quantize.slabs import sha256_file

Tensor = torch.Tensor
ACTIVATIONS = "activations"
"""What the manifest calls the file, in what it says of a calibration."""


def wanted(name: str) -> bool:
    """Whether activations in front of a weight decide how it is stored in int8."""
    return with_smoothing(dit_scheme(name, "int8"), name, measured=True).smooth


def activations_file(measured: Mapping[str, Tensor]) -> bytes:
    """The root mean square of each input channel [K], by weight, as the file has them: those that are wanted."""
    return safetensors.torch.save({name: rms.float().contiguous() for name, rms in measured.items() if wanted(name)})


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured, and the artifact's folder that has it; of no artifact nothing was. ``sources``: names and
    bytes of the files that the artifact was made from."""

    folder: Path | None
    by_weight: Mapping[str, Tensor]
    sha256: str = ""
    sources: frozenset[tuple[str, int]] = frozenset()

    @classmethod
    def of(cls, folder: str | Path | None) -> Measured:
        """Raises: CheckpointError where the folder is no artifact, was not calibrated, or its file has changed."""
        if folder is None:
            return cls(None, {})
        artifact = Artifact.open(folder)
        facts = artifact.manifest.get(CALIBRATION, {}).get(ACTIVATIONS)
        if facts is None:
            raise CheckpointError(
                f"{folder} has no measured activations; calibrate it first: the lowvram convert that made it, with "
                "--calibrate"
            )
        file = artifact.path / facts["file"]
        if not file.is_file() or sha256_file(file) != facts["sha256"]:
            raise CheckpointError(f"{file} is not there as it was written; calibrate {folder} again")
        sources = frozenset((Path(each["file"]).name, each["bytes"]) for each in artifact.manifest["sources"])
        return cls(artifact.path, safetensors.torch.load_file(file), facts["sha256"], sources)

    @property
    def given(self) -> bool:
        return self.folder is not None

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises: CheckpointError where they are not of a model of these shapes, or are no numbers."""
        lacking = [name for name in shapes if wanted(name) and name not in self.by_weight]
        strange = [
            name
            for name, rms in self.by_weight.items()
            if name not in shapes or rms.shape != shapes[name][1:] or not rms.isfinite().all() or (rms < 0).any()
        ]
        if lacking or strange:
            raise CheckpointError(
                f"{self.folder} was calibrated for another model: its activations "
                f"{f'lack {lacking[0]}' if lacking else f'of {strange[0]} do not fit'}; give an artifact of this one"
            )
