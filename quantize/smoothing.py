"""Smoothing: a factor an input channel, which activations are multiplied by and weights divided by before both are
quantized, so that neither has channels that drown the others' digits (SmoothQuant, https://arxiv.org/abs/2211.10438).

Behind a norm the factors are multiplied into the norm's gain and offset, and cost no pass over activations. They are
powers of two: a product with one loses no bit, in bfloat16 neither. A rotation follows; within its groups the error of
a product grows with |x s| |w / s|, which is least where s^2 = |w| / |x|. How large a channel's activations are is not
known without a calibration. Where training had its way weights tend to be small where activations are large, and
s^2 = |w| takes it that they are so to the half.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from lowvram_quantize.components import ComponentPlan, Item
from lowvram_quantize.units import unit_of

Tensor = torch.Tensor

# Of a weight's rows so many at least are looked at, in so many stretches: a norm over 256 of them is known to 4 %.
_ROWS, _STRETCHES = 320, 8
# Channels outside of these, over the median, are taken for dead.
_FAINT, _MOST = 2.0**-10, 2.0**10


def factors_of(plan: ComponentPlan, items: Sequence[Item]) -> dict[str, Tensor]:
    """Factors [K] float32 of each weight among ``items`` that is to be smoothed, by its name; those that read the same
    rows have the same."""
    by_input: dict[str, list[Item]] = {}
    for item in items:
        if item.scheme.smooth:
            by_input.setdefault(unit_of(item.name), []).append(item)
    found: dict[str, Tensor] = {}
    for sharing in by_input.values():
        squares = sum(_column_squares(plan, item) for item in sharing)
        assert isinstance(squares, Tensor)
        known = [plan.activations[item.name] for item in sharing if item.name in plan.activations]
        factors = smooth_factors(squares.sqrt(), known[0] if known else None)
        found |= {item.name: factors for item in sharing}
    return found


def smooth_factors(weights_K: Tensor, activations_K: Tensor | None = None) -> Tensor:
    """Powers of two [K], about 1 in the middle, from the norms of a weight's columns and, where it is known, the root
    mean square of each channel of its inputs."""
    ratio = _over_median(weights_K)
    if activations_K is not None:
        ratio = ratio / _over_median(activations_K)
    return torch.exp2(torch.log2(ratio).mul_(0.5).round_())


def _over_median(x_K: Tensor) -> Tensor:
    median = x_K.median()
    if not median > 0:
        return torch.ones_like(x_K)
    return (x_K / median).clamp_(_FAINT, _MOST)


def _column_squares(plan: ComponentPlan, item: Item) -> Tensor:
    """Sums of squares of a weight's columns, over some of its rows: [K] float32."""
    rows, update = item.ref.rows, plan.deltas.get(item.name)
    add = None if update is None else update.adder()
    stretch = -(-min(rows, _ROWS) // _STRETCHES)
    starts = range(0, rows, max(stretch, -(-rows // _STRETCHES)))
    total = torch.zeros(item.ref.shape[1])
    for start in starts:
        chunk = item.ref.read_rows(start, min(stretch, rows - start)).float()
        total += (chunk if add is None else add(chunk, start)).square().sum(dim=0)
    return total


def fingerprint(activations: Mapping[str, Tensor]) -> list[list[str]]:
    """Names and checksums, for what decides an artifact's bytes."""
    return [
        [name, hashlib.sha256(values.float().numpy().tobytes()).hexdigest()]
        for name, values in sorted(activations.items())
    ]
