"""How far a kernel's result is from its reference, as numbers that a bound can judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

Tensor = torch.Tensor
HALF_STEP = 0.502
"""Of rounding to integers; what is beyond a half is the rounding of scale and product."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """An error and the largest that is right."""

    error: float
    bound: float

    @property
    def right(self) -> bool:
        return self.error <= self.bound  # never where the error is NaN


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm; NaN where either has one, which no bound lets through."""
    expected = expected.double()
    return ((out.to(expected.device).double() - expected).norm() / expected.norm()).item()


def steps_off(values: Tensor, scale: Tensor, exact: Tensor) -> float:
    """The largest distance of ``values * scale`` from ``exact``, in steps of ``scale``: half a step where every number
    was rounded to the nearest."""
    return ((values.double() * scale.double() - exact.double()).abs() / scale.double()).max().item()


def worst(measured: Mapping[str, Measured]) -> tuple[str, Measured]:
    """The first that is wrong, otherwise the one nearest to its bound."""
    for name, one in measured.items():
        if not one.right:
            return name, one
    return max(measured.items(), key=lambda item: item[1].error / item[1].bound if item[1].bound else 0.0)


def beside_finite(outputs: Mapping[str, Tensor]) -> str:
    """Which outputs hold numbers that are not finite, "" for none; the references of all trials are finite."""
    wrong = []
    for name, out in outputs.items():
        if out.is_floating_point() and not (good := out.float().isfinite()).all():
            wrong.append(f"{name} has {int((~good).sum())} of {out.numel()} values that are NaN or infinite")
    return "; ".join(wrong)
