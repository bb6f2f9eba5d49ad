"""What is asked of ``convert``, checked before anything is read, and compared with what is there already."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from lowvram_kernels.errors import ConfigError
from lowvram_quantize.allocation import Budget
from lowvram_quantize.copied import AUDIO_ENCODER, TOKENIZER
from lowvram_quantize.format import Artifact
from lowvram_quantize.lora import LoraSource
from lowvram_quantize.schemes import EIGHT_BIT, MIXED, Scheme, chosen_group, with_rotation, with_smoothing

COMPONENTS = ("dit", "vae", "text_encoder", AUDIO_ENCODER, TOKENIZER)
PRECISIONS = ("int8", "fp8", "bf16", "fp32")
AUTO = "auto"
"""Precision of a DiT whose Linears are int8, fp8 or bf16 each, by what it may take; of the other components int8."""
TEXT_ENCODER_PRECISIONS = (*PRECISIONS, "nf4")
INT8 = Scheme("int8", "rows", EIGHT_BIT["int8"])


def precisions_of(default: str, dit: str | None, vae: str | None, text_encoder: str | None) -> dict[str, str]:
    others = "int8" if default == AUTO else default
    chosen = {"dit": dit or default, "vae": vae or others, "text_encoder": text_encoder or others}
    for name, precision in {"default": default, **chosen}.items():
        known = (*PRECISIONS, AUTO) if name in ("default", "dit") else PRECISIONS
        known = TEXT_ENCODER_PRECISIONS if name == "text_encoder" else known
        if precision not in known:
            raise ConfigError(f"precision of {name} is {precision!r}; expected one of {', '.join(known)}")
    return chosen


def budget_of(dit: str, wanted: tuple[str, ...], target_bytes: int | None, max_error: float | None) -> Budget | None:
    if dit == AUTO and "dit" in wanted:
        return Budget(target_bytes=target_bytes, max_error=max_error)
    if target_bytes is not None or max_error is not None:
        given = "--max-error" if target_bytes is None else "--target-bytes"
        raise ConfigError(
            f"{given} was given for a DiT in {dit}; it is what --precision auto stays within: give that, or leave "
            "it out"
        )
    return None


def wanted_of(components: Iterable[str]) -> tuple[str, ...]:
    wanted = tuple(components)
    if not wanted or set(wanted) - set(COMPONENTS):
        raise ConfigError(f"components are {list(wanted)}; expected some of {', '.join(COMPONENTS)}")
    return wanted


def lora_sources(
    lora: str | Path | Sequence[str | Path | LoraSource] | None, alpha: float | None = None
) -> list[LoraSource]:
    """What ``convert`` takes as ``lora``, in order.

    Raises:
        ConfigError: a weight of 0 or none, an alpha that is not above 0, or an alpha without a LoRA that needs it.
    """
    given = [lora] if isinstance(lora, (str, Path)) else list(lora or ())
    return [one if isinstance(one, LoraSource) else LoraSource.parse(one, alpha) for one in given]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Options of ``convert`` that say what an artifact holds, as they were given."""

    precision: str = "int8"
    dit: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    rotate: bool | int | None = None
    smooth: bool | None = None
    activations: Path | None = None
    target_bytes: int | None = None
    max_error: float | None = None
    measure_on: Path | None = None

    def check(self, artifact: Artifact) -> None:
        """Raises: ConfigError where a finished artifact is of another precision than was asked for, rotated or
        smoothed otherwise, or chosen within another budget."""
        for name, precision in artifact.precisions().items():
            wanted = getattr(self, name) or self.precision
            if wanted == AUTO:
                wanted = MIXED if name == "dit" else "int8"
            if wanted in (*PRECISIONS, "nf4", MIXED) and wanted != precision:
                raise ConfigError(
                    f"{artifact.path} holds a {name} in {precision}, and {wanted} was asked for; give the options that "
                    "it was made with to calibrate it, or convert it anew with --overwrite"
                )
        if "dit" in artifact.precisions():
            self._check_int8(artifact)
            self._check_budget(artifact)

    def _check_int8(self, artifact: Artifact) -> None:
        tensors = artifact.component("dit").facts["tensors"]
        smoothed = any(facts.get("smoothed") for facts in tensors.values())
        # By weights alone no others are than those behind norms.
        beyond = [n for n, facts in tensors.items() if facts.get("smoothed") and not with_smoothing(INT8, n).smooth]
        if self.activations is not None and not beyond:
            raise ConfigError(
                f"{artifact.path} was made without --activations; leave them out to calibrate, or convert anew with "
                "--overwrite"
            )
        if self.smooth is not None and smoothed != self.smooth:
            raise ConfigError(
                f"{artifact.path} has its inputs {'smoothed' if smoothed else 'not smoothed'}, and "
                f"--{'' if self.smooth else 'no-'}smooth was given; leave it out to calibrate, or convert anew with "
                "--overwrite"
            )
        if self.rotate is None:
            return
        component, most = artifact.component("dit"), chosen_group(self.rotate)
        for name, shape in ((s.name, s.shape) for slab in component.slab_names for s in component.slab_specs(slab)):
            group = component.tensor_group(name)
            if component.tensor_scheme(name) == "int8" and with_rotation(INT8, shape, most).group != group:
                raise ConfigError(
                    f"{artifact.path} has inputs of {name} rotated in groups of {group}, which is not what --rotate "
                    "says; leave it out to calibrate, or convert anew with --overwrite"
                )

    def _check_budget(self, artifact: Artifact) -> None:
        choice = artifact.component("dit").facts.get("choice") or {}
        for name in ("target_bytes", "max_error"):
            given, made = getattr(self, name), choice.get(name)
            if given is not None and given != made:
                within = "none" if made is None else f"{made:g}" if isinstance(made, float) else str(made)
                raise ConfigError(
                    f"{artifact.path} was made with --{name.replace('_', '-')} {within}, and {given} was given; leave "
                    "it out to calibrate, or convert anew with --overwrite"
                )
        if self.measure_on is not None and not choice.get("measured"):
            raise ConfigError(
                f"{artifact.path} was made without --measure-on; leave it out to calibrate, or convert anew with "
                "--overwrite"
            )
