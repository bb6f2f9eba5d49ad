"""PEFT's ``adapter_config.json``: what scales each layer of an adapter whose weights do not say it themselves."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.source import read_json

ADAPTER_CONFIG = "adapter_config.json"
# Settings under which merging is something else than adding B @ A.
_REFUSED = ("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "megatron_config", "alora_invocation_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """``patterns``: alphas of layers set apart, by PEFT's regular expressions (the end of a layer's name)."""

    file: Path
    alpha: float
    rank_stabilised: bool
    patterns: dict[str, float]

    def scaling(self, target: str, rank: int) -> tuple[float, float]:
        """(alpha, factor) of the base's tensor ``target``: alpha / r, or alpha / sqrt(r) where PEFT's rslora is on.
        The rank is that of the weights, so that ``rank_pattern`` is honoured as it was applied."""
        layer = target.removesuffix(".weight")
        own = (a for pattern, a in self.patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", layer))
        alpha = next(own, self.alpha)
        return alpha, alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_adapter(file: Path) -> Adapter:
    """Raises: CheckpointError where it is damaged, of another kind than LoRA, or has an alpha that is not above 0."""
    values = read_json(file)
    kind = values.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"{file} is of a {kind} adapter; expected peft_type LORA: use a LoRA")
    if on := [name for name in _REFUSED if values.get(name)]:
        raise CheckpointError(f"{file} has {on[0]} = {values[on[0]]!r}, which is not merged here; use a plain LoRA")
    patterns = values.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{file} has alpha_pattern = {patterns!r}; expected names and alphas: fetch it again")
    # PEFT's own default is 8, with which a configuration that leaves it out was trained.
    alpha = _alpha(file, "lora_alpha", values.get("lora_alpha", 8))
    return Adapter(
        file=file,
        alpha=alpha,
        rank_stabilised=bool(values.get("use_rslora")),
        patterns={_pattern(file, name): _alpha(file, f"alpha_pattern {name}", a) for name, a in patterns.items()},
    )


def _alpha(file: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"{file} has {name} = {value!r}; expected a number above 0: fetch it again")
    return float(value)


def _pattern(file: Path, name: str) -> str:
    try:
        re.compile(name)
    except re.error as error:
        raise CheckpointError(f"{file}: alpha_pattern {name!r} is no regular expression ({error}); mend it") from error
    return name
