"""Plans: what ``convert`` makes of each component, from what was asked of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping

from lowvram_kernels.errors import ConfigError
from lowvram_quantize.activations import Measured
from lowvram_quantize.allocation import Budget
from lowvram_quantize.checkpoint import Checkpoint
from lowvram_quantize.components import PLANNERS, ComponentPlan, plan_dit
from lowvram_quantize.format import FORMAT_VERSION
from lowvram_quantize.lora import LoraSource
from lowvram_quantize.mixed import check_budget
from lowvram_quantize.provenance import versions
from lowvram_quantize.smoothing import fingerprint
from lowvram_quantize.units import Int8, mixed

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked of ``convert``, checked as far as it can be without a checkpoint: see there.

    Raises:
        ConfigError: both a ``budget`` and weights that are set ``apart``.
    """

    wanted: tuple[str, ...]
    precisions: Mapping[str, str]
    loras: list[LoraSource]
    rotate: bool | int | None
    smooth: bool | None
    measured: Measured
    apart: Mapping[str, str]
    budget: Budget | None
    error_parts: Mapping[str, float] | None

    def __post_init__(self) -> None:
        if self.budget is not None and self.apart:
            raise ConfigError(
                "apart says how layers are stored, which auto chooses itself; expected one of both at most"
            )

    @property
    def int8(self) -> Int8:
        """How int8 Linears are stored."""
        return Int8.of(self.rotate, self.smooth, measured=self.measured.given)


def plans_of(checkpoint: Checkpoint, settings: Settings) -> list[ComponentPlan]:
    """Of all components that are wanted, the DiT first; where it has a budget, the plan is that of int8.

    Raises:
        CheckpointError: the checkpoint or a LoRA is missing something, damaged, or of another shape.
        ConfigError: settings that have no effect on it, or a budget that nothing meets.
    """
    plans = [_dit(checkpoint, settings)] if "dit" in settings.wanted else []
    _check_effects(settings, plans)
    others = {name: plan for name, plan in PLANNERS.items() if name in settings.wanted}
    return plans + [plan(checkpoint.file(name), settings.precisions[name]) for name, plan in others.items()]


def _dit(checkpoint: Checkpoint, settings: Settings) -> ComponentPlan:
    file, int8 = checkpoint.file("dit"), settings.int8
    plan = plan_dit(
        file,
        checkpoint.config(file),
        settings.precisions["dit"] if settings.budget is None else "int8",
        settings.loras,
        group=int8.group,
        smooth=int8.smooth,
        activations=settings.measured,
    )
    _check_alpha(settings.loras, plan)
    _check_sources(settings.measured, plan)
    if settings.budget is not None:
        check_budget(plan, settings.budget, int8)
    return mixed(plan, settings.apart, int8) if settings.apart else plan


def _check_effects(settings: Settings, plans: list[ComponentPlan]) -> None:
    """Raises: ConfigError where --rotate, --smooth or --activations would have none."""
    dit = f"whose DiT is {settings.precisions['dit']}" if plans else "without a DiT"
    if settings.rotate and not any(plan.largest_group > 1 for plan in plans):
        raise ConfigError(
            f"--rotate was given for an artifact {dit}; expected a DiT in int8 with Linears of an even width, whose "
            "inputs it rotates: leave it out, or convert the DiT to int8"
        )
    if (settings.smooth or settings.measured.given) and not any(plan.smoothed for plan in plans):
        given = "--activations were" if settings.measured.given else "--smooth was"
        dit += ", not smoothed" if settings.smooth is False else ""
        raise ConfigError(f"{given} given for an artifact {dit}; expected a DiT in int8: leave it out")


def _check_sources(measured: Measured, plan: ComponentPlan) -> None:
    """Of a fine-tuned model's activations the channels may be others; say so, and take them."""
    others = [f.name for f in plan.source_files if (f.name, f.stat().st_size) not in measured.sources]
    if measured.given and others:
        log.warning(
            "--activations: %s was not made from %s; what was measured there is taken all the same. If it is of "
            "another model, calibrate an artifact of this one",
            measured.folder,
            ", ".join(others[:3]),
        )


def _check_alpha(sources: list[LoraSource], plan: ComponentPlan) -> None:
    given = next((source.alpha for source in sources if source.alpha is not None), None)
    if given is not None and not any(lora.option_used for lora in plan.loras):
        stated = sorted({alpha for lora in plan.loras for alpha in lora.alphas.values()})
        own = f"states its own ({', '.join(f'{a:g}' for a in stated[:3])})" if stated else "has nothing that it scales"
        raise ConfigError(
            f"--lora-alpha is {given:g}, but the LoRA {own}: "
            "leave --lora-alpha out, or scale the LoRA as --lora path:weight"
        )


def fingerprint_of(plan: ComponentPlan) -> str:
    """Everything that decides a component's bytes, short of reading them."""
    files = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in plan.source_files]
    schemes = [
        [item.name, dataclasses.astuple(item.scheme), item.ref.kind, item.ref.name, item.ref.shape]
        # Not said where it is not so: what another version has begun of such a component goes on.
        + (["channels_last"] if item.channels_last else [])
        for item in plan.items
    ]
    loras = [
        [lora.file.name, lora.weight, sorted((n, update.factors) for n, update in lora.deltas.items())]
        for lora in plan.loras
    ]
    measured = fingerprint(plan.activations)
    facts = [FORMAT_VERSION, plan.name, plan.config, files, schemes, loras, measured, versions()]
    text = json.dumps(facts, sort_keys=True, default=str)  # a dtype has no other form
    return hashlib.sha256(text.encode()).hexdigest()
