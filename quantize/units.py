"""Units: the DiT's Linears that are stored alike, and what each costs in each scheme.

Linears that are multiplied with one and the same input are one unit: q, k and v of self-attention, k and v of
cross-attention and of the audio injection. Their input is then quantized once, and they run in one launch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import torch

from lowvram_kernels.errors import ConfigError
from lowvram_kernels.rotation import GROUP, rotated
from lowvram_quantize.components import ComponentPlan, Item
from lowvram_quantize.lora_updates import Update
from lowvram_quantize.schemes import (
    EIGHT_BIT,
    MIXED,
    chosen_group,
    dit_scheme,
    quantize_chunk,
    with_rotation,
    with_smoothing,
)
from lowvram_quantize.store import merged_chunks, stored_specs

Tensor = torch.Tensor

SCHEMES = ("int8", "fp8", "bf16")
"""What a unit can be stored as, the smallest first; int8 before fp8 where both err alike: every card computes in it."""

_SHARED_INPUT = (
    (re.compile(r"(blocks\.\d+\.self_attn)\.[qkv]\.weight"), "qkv"),
    (re.compile(r"(blocks\.\d+\.cross_attn|audio_injector\.injector\.\d+)\.[kv]\.weight"), "kv"),
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A unit in one scheme: the bytes that it is stored in, without padding, and its part in the square of the relative
    error that is predicted."""

    nbytes: int
    error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8:
    """How int8 Linears are stored: ``group`` is the most input channels that are rotated together; where ``smooth`` is
    set, inputs behind norms are smoothed."""

    group: int = GROUP
    smooth: bool = True

    @classmethod
    def of(cls, rotate: bool | int | None, smooth: bool | None, *, measured: bool) -> Int8:
        """As ``convert`` is asked for it; by default smoothed where rotated or where activations were ``measured``.

        Raises:
            ConfigError: so many channels cannot be rotated together.
        """
        group = chosen_group(rotate)
        return cls(group=group, smooth=group > 1 or measured if smooth is None else smooth)


Table = Mapping[str, Mapping[str, Choice]]
"""Unit -> scheme -> what it costs."""


def unit_of(name: str) -> str:
    """The unit of a weight, by its name."""
    for pattern, last in _SHARED_INPUT:
        if match := pattern.fullmatch(name):
            return f"{match[1]}.{last}"
    return name.removesuffix(".weight")


def units_of(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Units of a DiT -> their weights, in the order of ``items``."""
    found: dict[str, list[Item]] = {}
    for item in items:
        if dit_scheme(item.name, "int8").kind == "rows":
            found.setdefault(unit_of(item.name), []).append(item)
    return found


def mixed(plan: ComponentPlan, precisions: Mapping[str, str], int8: Int8) -> ComponentPlan:
    """The DiT with weights that ``precisions`` names in other schemes.

    Raises:
        ConfigError: one of them is no weight that can be stored in 8 bit, its precision is none of ``SCHEMES``, or not
            that of others with the same input.
    """
    able = {item.name for items in units_of(plan.items).values() for item in items}
    for name, precision in precisions.items():
        if name not in able or precision not in SCHEMES:
            raise ConfigError(
                f"{name} is to be stored in {precision}; expected a weight of one of the DiT's Linears, and one of "
                f"{', '.join(SCHEMES)}"
            )
    items = [_stored_as(plan, item, precisions.get(item.name), int8) for item in plan.items]
    for unit, own in units_of(items).items():
        if len({item.scheme for item in own}) > 1:
            said = ", ".join(f"{item.name} in {item.scheme.name}" for item in own)
            raise ConfigError(f"{unit} would have {said}; expected the same for all that share one input")
    return dataclasses.replace(plan, precision=MIXED, items=items)


def _stored_as(plan: ComponentPlan, item: Item, precision: str | None, int8: Int8) -> Item:
    if precision is None:
        return item
    scheme = with_rotation(dit_scheme(item.name, precision), item.ref.shape, int8.group)
    if int8.smooth:
        scheme = with_smoothing(scheme, item.name, measured=item.name in plan.activations)
    return dataclasses.replace(item, scheme=scheme)


def stored_bytes(plan: ComponentPlan, item: Item, precision: str, int8: Int8) -> int:
    """Of a weight, its scales and the factors of its inputs, without padding."""
    return sum(spec.nbytes for spec in stored_specs(_stored_as(plan, item, precision, int8)))


def weight_errors(item: Item, delta: Update | None, int8: Int8) -> dict[str, float]:
    """Squared relative errors of a weight in each of ``SCHEMES``, in one reading, a few rows at a time. In int8 it is
    rotated, but not smoothed: where that helps, int8 errs less than this.

    Raises:
        CheckpointError: a value is NaN or infinite, or the source cannot be read.
    """
    group = with_rotation(dit_scheme(item.name, "int8"), item.ref.shape, int8.group).group
    off, size = dict.fromkeys(SCHEMES, 0.0), 0.0
    for chunk in merged_chunks(item, delta, float32=True):
        rows = chunk.flatten(1)
        off["bf16"] += float((rows.bfloat16().float() - rows).double().square().sum())
        for scheme, dtype in EIGHT_BIT.items():
            turned = rotated(rows, group) if scheme == "int8" and group > 1 else rows.clone()
            *_, wrong, right = quantize_chunk(turned, dtype, item.name)
            off[scheme] += wrong
        size += right
    return {scheme: wrong / size if size else 0.0 for scheme, wrong in off.items()}
