"""Cache of what operations on ``meta`` give: torch works shapes out in Python, which takes longer than all else.

A video's blocks run the same operations on the same shapes thousands of times.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

Tensor = torch.Tensor
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """Either the ``changed`` argument comes back (an index, or a name of ``out``), or new tensors of ``layouts`` do."""

    changed: int | str | None
    layouts: tuple[Layout, ...]
    single: bool

    def again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(self.changed, int):
            return args[self.changed]
        if self.changed is not None:
            return kwargs[self.changed]
        made = tuple(
            torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in self.layouts
        )
        return made[0] if self.single else made


def key_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Everything that the outcome depends on; None where that is more than shapes and plain values."""
    parts: list[Any] = [func]
    on_device = _describe(args, parts)
    for name, value in kwargs.items():
        parts.append(name)
        on_device |= _describe((value,), parts)
    return tuple(parts) if on_device else None


def outcome_of(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome | None:
    """How to give ``result`` again; None where it is neither an argument nor new tensors on ``meta``."""
    for index, value in enumerate(args):
        if value is result:
            return Outcome(index, (), True)
    for name, value in kwargs.items():
        if value is result:
            return Outcome(name, (), True)
    results = (result,) if isinstance(result, Tensor) else result
    if not isinstance(results, tuple) or not all(type(t) is Tensor and t.is_meta for t in results):
        return None
    if any(t.untyped_storage().nbytes() != t.numel() * t.element_size() for t in results):
        return None  # a part of something larger
    layouts = tuple((t.shape, t.stride(), t.dtype) for t in results)
    return Outcome(None, layouts, isinstance(result, Tensor))


def _describe(values: Any, parts: list[Any]) -> bool:
    """Append what ``values`` are; whether one of them is on ``meta``."""
    on_device = False
    for value in values:
        kind = type(value)
        parts.append(kind)  # 1, 1.0 and True are equal and do not promote alike
        if isinstance(value, Tensor):
            on_device |= value.is_meta
            parts += (value.shape, value.stride(), value.dtype, value.is_meta)
        elif kind in (list, tuple):
            parts.append(len(value))
            on_device |= _describe(value, parts)
        else:
            parts.append(value)
    return on_device
