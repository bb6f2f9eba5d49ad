"""Options of ``convert`` that calibrate: what the finished artifact is run on, and where."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowvram.byte_sizes import parse_bytes
from lowvram.commands.shared_options import read_prompt

if TYPE_CHECKING:
    from lowvram.calibrate.calibrate import Calibrated
    from lowvram.calibrate.contributions import Preparation
    from lowvram.calibrate.inputs import CalibrationInputs
    from lowvram.calibrate.measure import Source
    from lowvram.offload.placement import MemoryOptions
    from lowvram_quantize.format import Artifact

# Without --calibrate none of them has an effect.
_OPTIONS = ("calibrate_image", "calibrate_audio", "calibrate_prompt", "calibrate_size", "device", "vram_budget")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was asked for, its files read before anything is converted. ``amends``: the finished artifact is calibrated;
    ``measure_on`` is one in full precision that is run before anything is converted."""

    amends: bool
    measure_on: Path | None
    given: CalibrationInputs
    files: dict[str, Path | None]
    device: str
    vram_budget: int | None

    def run(self, artifact: Artifact, source: Source) -> Calibrated:
        """What the artifact is to keep."""
        from lowvram.calibrate.calibrate import calibrate

        return calibrate(artifact, source, self.given, device=self.device, memory=self._memory)

    def parts(self, artifact: Artifact, source: Preparation, units: Mapping[str, Sequence[str]]) -> dict[str, float]:
        """What the int8 of each of the ``units`` costs the output of the ``artifact``."""
        from lowvram.calibrate.contributions import contributions

        return contributions(artifact, source, self.given.inputs, units, device=self.device, memory=self._memory)

    @property
    def _memory(self) -> MemoryOptions:
        from lowvram.offload.placement import MemoryOptions

        return MemoryOptions(vram_budget=self.vram_budget)


def take_calibration(options: dict[str, Any]) -> Calibration | None:
    """Take these options out of all of ``convert``'s; None where nothing is to be run.

    Raises:
        UsageError: options of a calibration without it, or --measure-on without --precision auto.
        LowvramError: a portrait, voice, prompt, size, device or budget that cannot be used.
    """
    asked = {name: options.pop(name) for name in _OPTIONS}
    amends, measure_on = options.pop("calibrate"), options.pop("measure_on")
    if measure_on is not None and (options["dit"] or options["precision"]) != "auto":
        raise click.UsageError("--measure-on is for --precision auto or --dit auto; add one, or leave it out")
    if not amends and measure_on is None:
        names = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value is not None]
        if names:
            raise click.UsageError(
                f"{', '.join(names)} would have an effect with --calibrate or --measure-on only; add it, or leave out"
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
        amends=amends,
        measure_on=measure_on,
        given=calibration_inputs(image=image, audio=audio, prompt=text, size=asked["calibrate_size"]),
        files={"--calibrate-image": image, "--calibrate-audio": audio},
        device=device,
        vram_budget=None if budget is None else parse_bytes(budget, "--vram-budget"),
    )
