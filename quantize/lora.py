"""A LoRA in PEFT's naming, to be merged into the weights: ``W += alpha / r * B @ A`` in float32."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.source import TensorRef, TensorTable, open_safetensors

Tensor = torch.Tensor

_PREFIX = "base_model.model."
_MARKS = {"lora_A": "A", "lora_B": "B"}


@dataclasses.dataclass(frozen=True)
class Delta:
    """One layer's update: ``factor * B @ A`` with A [r, in] and B [out, r]."""

    a: TensorRef
    b: TensorRef
    factor: float

    def load(self) -> tuple[Tensor, Tensor]:
        """(factor * B, A), float32."""
        return self.b.read().float().mul_(self.factor), self.a.read().float()


@dataclasses.dataclass(frozen=True)
class Lora:
    """What a LoRA file changes, by the name of the base's tensor: updates, and tensors that it replaces whole."""

    file: Path
    alpha: float
    deltas: dict[str, Delta]
    replaced: dict[str, TensorRef]

    def summary(self) -> dict[str, Any]:
        ranks = sorted({delta.a.rows for delta in self.deltas.values()})
        return {
            "file": self.file.name,
            "alpha": self.alpha,
            "ranks": ranks,
            "merged": len(self.deltas),
            "replaced": len(self.replaced),
        }


def open_lora(path: Path, alpha: float, base: TensorTable) -> Lora:
    """Read a LoRA's names and match them with the base's.

    Accepts PEFT's names with and without the prefix ``base_model.model.`` and the adapter's name ``.default``.

    Raises:
        CheckpointError: a name matches nothing, a pair is not whole, or a shape does not fit.
    """
    pairs: dict[str, dict[str, TensorRef]] = {}
    replaced: dict[str, TensorRef] = {}
    for name, ref in open_safetensors(path).items():
        target, mark = _target(name)
        if mark is None:
            replaced[target] = ref
        elif mark in pairs.setdefault(target, {}):
            raise CheckpointError(f"{path} has two lora_{mark} for {target}; expected one adapter: save it alone")
        else:
            pairs[target][mark] = ref
    _check_targets(path, [*pairs, *replaced], base)
    for target, ref in replaced.items():
        if ref.shape != base[target].shape:
            raise CheckpointError(
                f"{path}: {ref.name} has shape {list(ref.shape)}, the base's is {list(base[target].shape)}; "
                "use the LoRA that was made for this checkpoint"
            )
    deltas = {target: _delta(path, target, pair, alpha, base[target]) for target, pair in pairs.items()}
    return Lora(path, alpha, deltas, replaced)


def _target(name: str) -> tuple[str, str | None]:
    """(the base's tensor, "A" or "B"; None for a whole tensor)."""
    parts = name.removeprefix(_PREFIX).split(".")
    for index, part in enumerate(parts):
        if part in _MARKS:
            return ".".join([*parts[:index], "weight"]), _MARKS[part]
    return ".".join(parts), None


def _check_targets(path: Path, targets: list[str], base: TensorTable) -> None:
    unknown = sorted(set(targets) - set(base))
    if not targets or unknown:
        example = next(iter(base), "")
        raise CheckpointError(
            f"{path}: {len(unknown)} of {len(targets)} names match nothing in the base, as {unknown[:2]}; expected "
            f"names as {example!r} with lora_A and lora_B: use the LoRA that was made for this checkpoint"
        )


def _delta(path: Path, target: str, pair: dict[str, TensorRef], alpha: float, base: TensorRef) -> Delta:
    if set(pair) != {"A", "B"}:
        raise CheckpointError(
            f"{path}: {target} has only lora_{next(iter(pair))}; expected lora_A and lora_B: fetch it again"
        )
    a, b = pair["A"], pair["B"]
    fits = len(a.shape) == len(b.shape) == len(base.shape) == 2
    if not fits or (b.shape[0], a.shape[1]) != base.shape or a.shape[0] != b.shape[1] or not a.rows:
        raise CheckpointError(
            f"{path}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit {target} {list(base.shape)}; "
            "expected [r, in] and [out, r]: use the LoRA that was made for this checkpoint"
        )
    return Delta(a, b, alpha / a.shape[0])
