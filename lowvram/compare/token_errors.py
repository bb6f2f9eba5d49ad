"""Errors of single tokens, as users of llama.cpp's comparison of logits know them: mean, median, tail and maximum, each
with its uncertainty.

A token is a patch of 2 x 2 of the latent, which the DiT predicts a velocity for: C channels of each are 4 C numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowvram.compare.metrics import TensorSums

Tensor = torch.Tensor
Errors = NDArray[np.float32]

RESAMPLES = 200
UNCERTAINTY = f"standard deviation over {RESAMPLES} resamples of whole blocks (bootstrap)"
QUANTILES = {"median": 0.5, "p99": 0.99, "p999": 0.999, "maximum": 1.0}


@dataclasses.dataclass(frozen=True)
class Figure:
    """``uncertainty`` as ``UNCERTAINTY`` says; None where it is not known: of one block, or of infinite errors."""

    value: float
    uncertainty: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of many tokens. ``relative_error`` and ``cosine`` take all of them together, as of one tensor; the others are of
    the tokens' own relative errors."""

    tokens: int
    relative_error: Figure
    cosine: Figure
    mean: Figure
    median: Figure
    p99: Figure
    p999: Figure
    maximum: Figure

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A candidate's velocity in one step of one block: sums over all of it, and each token's relative error."""

    sums: TensorSums
    errors: Errors

    @classmethod
    def of(cls, mine_CFhw: Tensor, wanted_CFhw: Tensor) -> Sample:
        """Raises: ValueError for NaN or infinity."""
        sums = TensorSums()
        sums.add(mine_CFhw, wanted_CFhw)
        return cls(sums, token_errors(mine_CFhw, wanted_CFhw))


def token_errors(mine_CFhw: Tensor, wanted_CFhw: Tensor) -> Errors:
    """|mine - wanted| / |wanted| of each token [F * h/2 * w/2]; 0 where both are zeros, infinite where only the wanted
    one is."""
    wrong, right = (_token_squares(t.double()) for t in (mine_CFhw - wanted_CFhw, wanted_CFhw))
    errors = torch.where(wrong == 0, 0.0, (wrong / right).sqrt())
    found: Errors = errors.float().numpy()
    return found


def _token_squares(x_CFhw: Tensor) -> Tensor:
    channels, frames, height, width = x_CFhw.shape
    patches = x_CFhw.reshape(channels, frames, height // 2, 2, width // 2, 2)
    return patches.square().sum(dim=(0, 3, 5)).flatten()


def statistics(blocks: Sequence[Sequence[Sample]]) -> Statistics:
    """Of all samples; those of one block stand or fall together when the uncertainty is estimated, as its tokens and
    steps depend on each other.

    Which blocks a resample has is drawn from a fixed seed, so that the same errors have the same uncertainty.
    """
    count = len(blocks)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES) if count > 1 else None
    every = np.concatenate([sample.errors for block in blocks for sample in block])
    tokens = [sum(len(sample.errors) for sample in block) for block in blocks]
    owner = np.repeat(np.arange(count, dtype=np.int32), tokens)
    quantiles = _quantiles(every, owner, drawn)
    sums = np.stack([_together(block).parts for block in blocks])
    errors = [sum(float(sample.errors.sum(dtype=np.float64)) for sample in block) for block in blocks]
    totals = np.stack([errors, tokens], axis=1).astype(np.float64)
    return Statistics(
        tokens=len(every),
        relative_error=_figure(sums, drawn, lambda parts: TensorSums.of(parts).score("").relative_error),
        cosine=_figure(sums, drawn, lambda parts: TensorSums.of(parts).score("").cosine),
        mean=_figure(totals, drawn, lambda total: float(total[0] / total[1])),
        **quantiles,
    )


def _together(samples: Iterable[Sample]) -> TensorSums:
    total = TensorSums()
    for sample in samples:
        total.merge(sample.sums)
    return total


def _figure(
    of_blocks: NDArray[np.float64], drawn: NDArray[np.int64] | None, value: Callable[[NDArray[np.float64]], float]
) -> Figure:
    """Of a ``value`` of the sum over blocks [blocks, n]. Infinite ones are not drawn from: no times infinity is
    nothing that can be added."""
    again = [] if drawn is None or not np.isfinite(of_blocks).all() else [value(times @ of_blocks) for times in drawn]
    return Figure(value(of_blocks.sum(axis=0)), _deviation(again))


def _quantiles(errors: Errors, owner: NDArray[np.int32], drawn: NDArray[np.int64] | None) -> dict[str, Figure]:
    """The smallest errors that so many tokens do not exceed."""
    order = np.argsort(errors, kind="stable")
    errors, owner = errors[order], owner[order]
    again: dict[str, list[float]] = {name: [] for name in QUANTILES}
    for times in [] if drawn is None else drawn:
        behind = np.cumsum(times[owner])
        for name, part in QUANTILES.items():
            again[name].append(float(errors[np.searchsorted(behind, math.ceil(part * behind[-1]))]))
    places = {name: max(math.ceil(part * len(errors)) - 1, 0) for name, part in QUANTILES.items()}
    return {name: Figure(float(errors[place]), _deviation(again[name])) for name, place in places.items()}


def _deviation(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if values and np.isfinite(values).all() else None
