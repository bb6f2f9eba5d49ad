"""Options of ``convert`` that calibrate: what the finished artifact is run on, and where."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowvram.byte_sizes import parse_bytes
from lowvram.commands.shared_options import read_prompt

if TYPE_CHECKING:
    from lowvram.calibrate.calibrate import Calibrated
    from lowvram.calibrate.inputs import CalibrationInputs
    from lowvram.calibrate.measure import Source
    from lowvram_quantize.format import Artifact

# Without --calibrate none of them has an effect.
_OPTIONS = ("calibrate_image", "calibrate_audio", "calibrate_prompt", "calibrate_size", "device", "vram_budget")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was asked for, its files read before anything is converted."""

    given: CalibrationInputs
    files: dict[str, Path | None]
    device: str
    vram_budget: int | None

    def run(self, artifact: Artifact, source: Source) -> Calibrated:
        """What the artifact is to keep."""
        from lowvram.calibrate.calibrate import calibrate
        from lowvram.offload.placement import MemoryOptions

        memory = MemoryOptions(vram_budget=self.vram_budget)
        return calibrate(artifact, source, self.given, device=self.device, memory=memory)


def take_calibration(options: dict[str, Any]) -> Calibration | None:
    """Take these options out of all of ``convert``'s; None where it is not to calibrate.

    Raises:
        UsageError: options of a calibration without it.
        LowvramError: a portrait, voice, prompt, size, device or budget that cannot be used.
    """
    asked = {name: options.pop(name) for name in _OPTIONS}
    if not options.pop("calibrate"):
        names = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value is not None]
        if names:
            raise click.UsageError(
                f"{', '.join(names)} would have an effect with --calibrate only; add it, or leave out"
            )
        return None
    from lowvram.calibrate.inputs import calibration_inputs
    from lowvram.devices import choose_device

    budget, prompt = asked["vram_budget"], asked["calibrate_prompt"]
    device = "auto" if asked["device"] is None else asked["device"]
    choose_device(device)
    image, audio = asked["calibrate_image"], asked["calibrate_audio"]
    text = None if prompt is None else read_prompt(prompt)
    return Calibration(
        given=calibration_inputs(image=image, audio=audio, prompt=text, size=asked["calibrate_size"]),
        files={"--calibrate-image": image, "--calibrate-audio": audio},
        device=device,
        vram_budget=None if budget is None else parse_bytes(budget, "--vram-budget"),
    )
