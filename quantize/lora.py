"""LoRAs and their kin, to be merged into the weights: ``W += weight * alpha / r * B @ A`` in float32, of several their
sum; what else can be added is in ``lora_updates``."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowvram_kernels.errors import CheckpointError, ConfigError
from lowvram_quantize.checkpoint import hugging_face_snapshot
from lowvram_quantize.lora_alpha import ADAPTER_CONFIG, Adapter, read_adapter
from lowvram_quantize.lora_names import Names, other_kind
from lowvram_quantize.lora_shapes import USE, difference_of, rank_of, update_of
from lowvram_quantize.lora_updates import Update, added
from lowvram_quantize.source import TensorRef, TensorTable
from lowvram_quantize.tables import open_table

log = logging.getLogger(__name__)

DEFAULT_ALPHA = 64.0
"""Of LiveAvatar's LoRA, whose file states none."""
_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSource:
    """A file or folder, ``weight`` times; ``alpha`` is for pairs that state none (None: as their spelling implies)."""

    path: Path
    weight: float = 1.0
    alpha: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ConfigError(f"the LoRA {self.path} has the weight {self.weight}; expected a number other than 0")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ConfigError(f"--lora-alpha is {self.alpha}; expected a number above 0, as 64 for LiveAvatar's")

    @classmethod
    def parse(cls, text: str | Path, alpha: float | None = None) -> LoraSource:
        """``path`` or ``path:weight``; what exists as it is written is a path, whatever colons are in it."""
        if isinstance(text, Path) or Path(text).exists():
            return cls(path=Path(text), alpha=alpha)
        path, colon, tail = text.rpartition(":")
        try:
            weight = float(tail) if colon else 1.0
        except ValueError:  # a drive, or a colon in a name
            return cls(path=Path(text), alpha=alpha)
        if not colon or not path:
            return cls(path=Path(text), alpha=alpha)
        return cls(path=Path(path), weight=weight, alpha=alpha)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """What a LoRA changes, by the name of the base's tensor: updates, and tensors that it replaces whole."""

    file: Path
    weight: float
    alphas: dict[str, float]
    deltas: dict[str, Update]
    replaced: dict[str, TensorRef]
    config: Path | None = None
    option_used: bool = False
    """Whether an alpha came from the option."""

    @property
    def files(self) -> list[Path]:
        return [self.file, *([self.config] if self.config else [])]

    def summary(self) -> dict[str, Any]:
        alphas = sorted(set(self.alphas.values()))
        return {
            "file": self.file.name,
            "weight": self.weight,
            "alpha": alphas[-1] if alphas else 0.0,
            "alphas": alphas,
            "ranks": sorted({rank for update in self.deltas.values() for rank in update.ranks}),
            "merged": len(self.deltas),
            "replaced": len(self.replaced),
        }


def merge_loras(loras: Sequence[Lora]) -> tuple[dict[str, Update], dict[str, TensorRef]]:
    """All updates and replaced tensors together.

    Raises:
        CheckpointError: two of them replace the same tensor.
    """
    deltas: dict[str, Update] = {}
    replaced: dict[str, TensorRef] = {}
    for lora in loras:
        if twice := sorted(set(replaced) & set(lora.replaced)):
            raise CheckpointError(
                f"{replaced[twice[0]].file} and {lora.file} both replace {twice[0]}; expected one to: leave one out"
            )
        replaced |= lora.replaced
        for target, update in lora.deltas.items():
            deltas[target] = added(deltas.get(target), update)
    return deltas, replaced


def open_lora(source: LoraSource, base: TensorTable) -> Lora:
    """Read a LoRA's names, in any of the spellings of ``lora_names``, and match them with the base's.

    Raises:
        CheckpointError: a name matches nothing, a pair is not whole, a shape does not fit, an alpha is not above 0, or
            it is an adapter of another kind.
    """
    path, adapter = _find(source.path)
    table, names = open_table(path), Names(base)
    kind = other_kind(table)
    if kind is not None:
        raise CheckpointError(f"{path} holds {kind}, not merged here; expected a LoRA of lora_A and lora_B: {USE}")
    layers: dict[str, dict[str, TensorRef]] = {}
    replaced: dict[str, TensorRef] = {}
    down_up: set[str] = set()
    for name, ref in table.items():
        read = names.read(name)
        down_up |= {read.target} if read.down_up else set()
        if read.role and read.role in layers.setdefault(read.target, {}):
            role = f"lora_{read.role}" if read.role in "AB" else read.role
            raise CheckpointError(f"{path} has two {role} for {read.target}; expected one adapter: save it alone")
        if not read.role and read.target in replaced:
            raise CheckpointError(
                f"{path} has {read.target} twice, under other prefixes; expected it once: save it alone"
            )
        if read.role:
            layers[read.target][read.role] = ref
        else:
            replaced[read.target] = ref
    _check_targets(path, list(dict.fromkeys([*layers, *replaced])), base)
    _check_codes(path, table)
    _check_replaced(source, path, replaced, base)
    return _matched(source, path, adapter, base, layers, replaced, down_up)


def _matched(
    source: LoraSource,
    path: Path,
    adapter: Adapter | None,
    base: TensorTable,
    layers: dict[str, dict[str, TensorRef]],
    replaced: dict[str, TensorRef],
    down_up: set[str],
) -> Lora:
    deltas: dict[str, Update] = {}
    alphas: dict[str, float] = {}
    option_used, unscaled = False, []
    for target, roles in layers.items():
        rank, factor = rank_of(path, target, roles), 1.0
        if rank is not None:
            # An alpha that is left out means the rank, except beside lora_A and lora_B.
            implied = target in down_up or "A" not in roles
            stored = roles.get("alpha")
            alphas[target], factor = _scaling(source, path, adapter, target, stored, max(rank, 1), implied)
            option_used |= stored is None and adapter is None and source.alpha is not None
        elif "alpha" in roles:
            unscaled.append(roles["alpha"].name)
        update = update_of(path, target, roles, base[target], source.weight * factor)
        if update is not None:
            deltas[target] = update
        if "diff" in roles:
            deltas[target] = added(deltas.get(target), difference_of(path, roles["diff"], base[target], source.weight))
    if unscaled:
        log.warning(
            "%s: %d alphas scale nothing, as %s: no product of factors is beside", path, len(unscaled), unscaled[0]
        )
    return Lora(
        file=path, weight=source.weight, alphas=alphas, deltas=deltas, replaced=replaced,
        config=adapter.file if adapter else None, option_used=option_used,
    )  # fmt: skip


def _find(path: Path) -> tuple[Path, Adapter | None]:
    """The file of weights, in ``path`` where that is a folder, and PEFT's adapter_config.json beside it."""
    if path.is_dir():
        folder = hugging_face_snapshot(path, "liveavatar")
        files = sorted(p for p in folder.iterdir() if p.suffix in _FILES)
        named = [p for p in files if p.stem in ("adapter_model", "liveavatar", "pytorch_lora_weights")]
        chosen = named if len(named) == 1 else files
        if len(chosen) != 1:
            names = ", ".join(p.name for p in files[:4]) or "none"
            raise CheckpointError(f"{path} holds {len(files)} files that may be a LoRA ({names}); name one of them")
        path = chosen[0]
    config = path.with_name(ADAPTER_CONFIG)
    return path, read_adapter(config) if config.is_file() else None


def _scaling(
    source: LoraSource,
    path: Path,
    adapter: Adapter | None,
    target: str,
    stored: TensorRef | None,
    rank: int,
    down_up: bool,
) -> tuple[float, float]:
    """(alpha, factor): the file's own alpha, else adapter_config's, else the option's, else the spelling's."""
    if stored is not None:
        value = stored.read().float()
        alpha = float(value.reshape(-1)[0]) if value.numel() == 1 else math.nan
        where = f"{path}: {stored.name}"
    elif adapter is not None:
        return adapter.scaling(target, rank)
    else:
        implied = float(rank) if down_up else DEFAULT_ALPHA
        alpha, where = (implied if source.alpha is None else source.alpha), "--lora-alpha"
    if not 0 < alpha < math.inf:
        raise CheckpointError(f"{where} is {alpha}; expected one number above 0: fetch the LoRA again")
    return alpha, alpha / rank


def _check_replaced(source: LoraSource, path: Path, replaced: dict[str, TensorRef], base: TensorTable) -> None:
    for target, ref in replaced.items():
        if ref.shape != base[target].shape:
            raise CheckpointError(
                f"{path}: {ref.name} has shape {list(ref.shape)}, the base's is {list(base[target].shape)}; {USE}"
            )
    if replaced and source.weight != 1:
        raise CheckpointError(
            f"{path} replaces {len(replaced)} whole tensors, as {next(iter(replaced))}, which a weight of "
            f"{source.weight} would not scale; expected the weight 1: leave it out"
        )


def _check_targets(path: Path, targets: list[str], base: TensorTable) -> None:
    unknown = sorted(set(targets) - set(base))
    if not targets or unknown:
        example = next(iter(base), "")
        raise CheckpointError(
            f"{path}: {len(unknown)} of {len(targets)} names match nothing in the base, as {unknown[:2]}; expected "
            f"names as {example!r} with lora_A and lora_B, or lora_down and lora_up: {USE}"
        )


def _check_codes(path: Path, table: TensorTable) -> None:
    for name, ref in table.items():
        if not ref.dtype.is_floating_point and not name.endswith(".alpha"):
            raise CheckpointError(f"{path}: {name} is {ref.kind}, and no scale lies beside it; {USE}, in bf16 or fp8")
