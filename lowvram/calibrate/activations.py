"""Activations of a Linear: sums over all rows that come, and some of the rows themselves.

Shapes: L rows (tokens), K input channels.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from typing import Any

import torch

from lowvram_kernels.errors import CheckpointError

Tensor = torch.Tensor

SAMPLED_ROWS = 32
"""Of each call, kept on the host in the dtype that is computed in. Of the published model, of whose Linears several
share their inputs, a row takes 79 kB a layer in bfloat16: 0.8 GB for 8 calls, whatever the size of the video."""
DEAD = 1e-3
"""Of the root mean square of all channels: a channel that never exceeds it is dead."""
_CHUNK_VALUES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activations:
    """Statistics of a Linear's inputs. ``tokens``: rows seen; ``amax`` the largest magnitude; ``rms`` root mean square;
    ``channel_ratio`` largest over median of the channels' own largest magnitudes (infinite where the median is 0);
    ``kurtosis`` of all values (3 of normal ones, more where few stand out); ``dead`` share of channels that never
    exceed a thousandth of ``rms``."""

    tokens: int
    amax: float
    rms: float
    channel_ratio: float
    kurtosis: float
    dead: float

    def to_json(self) -> dict[str, Any]:
        """With None for what is not finite."""
        return {name: value if math.isfinite(value) else None for name, value in dataclasses.asdict(self).items()}


class Watched:
    """What one Linear is given, call by call."""

    def __init__(self) -> None:
        self.samples: list[Tensor] = []
        self._tokens = 0
        self._amax: Tensor | None = None
        self._squares: Tensor | None = None
        self._sums: Tensor | None = None

    def add(self, x_LK: Tensor, sample: Tensor) -> None:
        """Rows, and the ``sample`` of them. The same input as the last one, as the text is in every step, is passed
        over."""
        if self.samples and self.samples[-1] is sample:
            return
        self.samples.append(sample)
        self._tokens += len(x_LK)
        for rows in x_LK.split(max(1, _CHUNK_VALUES // x_LK.shape[1])):
            x = rows.double()  # fourth powers of outliers
            amax, square = x.abs().amax(dim=0), x.square()
            squares = square.sum(dim=0)
            self._squares = squares if self._squares is None else self._squares + squares
            sums = torch.stack([power.sum() for power in (x, square, square * x, square.square())])
            self._amax = amax if self._amax is None else torch.maximum(self._amax, amax)
            self._sums = sums if self._sums is None else self._sums + sums

    def channel_rms(self) -> Tensor:
        """The root mean square of each channel, float32 [K] on the host; of what ``statistics`` accepts."""
        assert self._squares is not None
        return (self._squares.cpu() / self._tokens).sqrt().float()

    def rows(self) -> Tensor:
        """Those that were kept, [rows, K]."""
        return torch.cat(self.samples)

    def statistics(self, name: str) -> Activations:
        """Raises: CheckpointError where a value was NaN or infinite, or none came."""
        if self._amax is None or self._sums is None:
            raise CheckpointError(f"{name} was never computed in the run; convert the checkpoint again")
        amax, count = self._amax.cpu(), self._tokens * len(self._amax)
        first, second, third, fourth = (self._sums.cpu() / count).tolist()
        largest, median = float(amax.max()), float(amax.median())
        if not math.isfinite(largest) or not math.isfinite(fourth):
            raise CheckpointError(
                f"the inputs of {name} hold NaN or infinity; expected numbers: check the artifact with lowvram inspect "
                "--verify, and this machine with lowvram selftest"
            )
        variance = second - first**2
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        rms = math.sqrt(second)
        return Activations(
            tokens=self._tokens,
            amax=largest,
            rms=rms,
            channel_ratio=largest / median if median else (math.inf if largest else 1.0),
            kurtosis=central / variance**2 if variance > 0 else math.nan,
            dead=float((amax <= DEAD * rms).double().mean()),
        )


class Sampler:
    """Rows of an input: distinct ones, some of them copied to the host, once for all Linears that share the input."""

    def __init__(self, limit: int = SAMPLED_ROWS):
        self._limit = limit
        self._made: dict[int, tuple[weakref.ref[Tensor], Tensor | None, Tensor]] = {}

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., K] -> the rows [L, K] without those that repeat the row before them, as padding does, and up to the
        limit of them on the host."""
        rows = x.detach().reshape(-1, x.shape[-1])
        found = self._made.get(id(x))
        if found is not None and found[0]() is x:
            _, distinct, sample = found
            return rows if distinct is None else rows[distinct], sample
        # Only what is still there, and no rows: an input that nobody needs any more is let go.
        self._made = {key: entry for key, entry in self._made.items() if entry[0]() is not None}
        again, distinct = (rows[1:] == rows[:-1]).all(dim=1), None
        if bool(again.any()):
            distinct = torch.cat([again.new_zeros(1), again]).logical_not()
            rows = rows[distinct]
        count = min(len(rows), self._limit)
        places = torch.linspace(0, len(rows) - 1, count, device=rows.device).round().long()
        sample = rows[places].cpu()
        self._made[id(x)] = weakref.ref(x), distinct, sample
        return rows, sample
