"""Error of the residual stream after each layer, of a candidate that is given the baseline's latents.

Shapes: K sampled tokens, D width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowvram_kernels.errors import InputError

Tensor = torch.Tensor
Step = tuple[int, int]
"""(block, step), both counted from 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """Of every layer, in order, behind the embedding of the latent, which is the first: ``relative_errors`` are
    |candidate - baseline| / |baseline| of the residual stream behind it, ``increments`` what the layer alone adds to
    the difference of the two, over the same norm."""

    relative_errors: tuple[float, ...]
    increments: tuple[float, ...]

    @property
    def names(self) -> list[str]:
        return ["embedding", *(f"layer {index}" for index in range(len(self.relative_errors) - 1))]

    def to_json(self) -> list[dict[str, Any]]:
        rows = zip(self.names, self.relative_errors, self.increments, strict=True)
        return [{"after": name, "relative_error": error, "increment": added} for name, error, added in rows]


class LayerSums:
    """Takes the sampled tokens [K, D] of a candidate, layer by layer, while they go through."""

    def __init__(self) -> None:
        self._sums: dict[Step, list[tuple[float, float, float]]] = {}
        self._difference: dict[Step, Tensor] = {}

    @property
    def steps(self) -> list[Step]:
        return sorted(self._sums)

    def add(self, at: Step, count: int, mine_KD: Tensor, wanted_KD: Tensor) -> None:
        """Behind ``count`` layers. A pass that failed and is repeated begins with 0 again.

        Raises:
            InputError: the candidate's is of another shape, or holds NaN or infinity.
        """
        if mine_KD.shape != wanted_KD.shape:
            raise InputError(
                f"between layers the candidate has tokens {list(mine_KD.shape)}, the baseline {list(wanted_KD.shape)}: "
                "they are of different models or sizes; compare artifacts of one checkpoint"
            )
        difference = mine_KD.double() - wanted_KD.double()
        added = difference - self._difference[at] if count else difference
        self._difference[at] = difference
        sums = [float(t.square().sum()) for t in (difference, added, wanted_KD.double())]
        if not math.isfinite(sum(sums)):
            where = f"behind layer {count - 1}" if count else "before the first layer"
            raise InputError(f"block {at[0]}, step {at[1]}: NaN or infinity {where}; one of the runs went wrong")
        self._sums[at] = [*self._sums.get(at, [])[:count], (sums[0], sums[1], sums[2])]

    def errors(self, chosen: Iterable[Step]) -> LayerErrors:
        """Of these steps, taken together."""
        total: NDArray[np.float64] = np.sum([self._sums[at] for at in chosen], axis=0)
        return LayerErrors(
            relative_errors=tuple(_relative(wrong, right) for wrong, _, right in total),
            increments=tuple(_relative(added, right) for _, added, right in total),
        )


def _relative(wrong: float, right: float) -> float:
    return math.sqrt(wrong / right) if right else (math.inf if wrong else 0.0)
