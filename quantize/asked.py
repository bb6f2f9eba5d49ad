"""What is asked of ``convert``, checked before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lowvram_kernels.errors import ConfigError
from lowvram_quantize.allocation import Budget
from lowvram_quantize.copied import AUDIO_ENCODER, TOKENIZER
from lowvram_quantize.lora import LoraSource

COMPONENTS = ("dit", "vae", "text_encoder", AUDIO_ENCODER, TOKENIZER)
PRECISIONS = ("int8", "fp8", "bf16", "fp32")
AUTO = "auto"
"""Precision of a DiT whose Linears are int8, fp8 or bf16 each, by what it may take; of the other components int8."""
TEXT_ENCODER_PRECISIONS = (*PRECISIONS, "nf4")


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
