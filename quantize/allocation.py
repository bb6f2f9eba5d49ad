"""Allocation: which units of a DiT are worth more bytes, within a budget of bytes or of error.

A knapsack: each unit takes one of its schemes, what it costs are bytes, and what it gives is that its part in the
square of the predicted error becomes smaller; parts add up. Solved exactly but for the grid that bytes are rounded to,
and checked against the bytes of the whole file.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lowvram_kernels.errors import ConfigError
from lowvram_quantize.units import SCHEMES, Choice, Table

log = logging.getLogger(__name__)

CELLS = 1 << 14
"""Of the grid that a budget's bytes are rounded to."""
MARGIN = 0.01
"""A target is met where no more than this share of it is left over."""

Schemes = Mapping[str, str]
"""Unit -> scheme."""
SizeOf = Callable[[Schemes], int]
"""Bytes of the whole file of a DiT that is stored so."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What a DiT's file may take, or the relative error that it may have; one of both.

    Raises:
        ConfigError: both, none, or one that nothing meets.
    """

    target_bytes: int | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        if (self.target_bytes is None) == (self.max_error is None):
            given = "neither was" if self.target_bytes is None else "both were"
            raise ConfigError(
                "--precision auto stays within --target-bytes, as 17GB, or within --max-error, as 0.02; expected one "
                f"of both, and {given} given"
            )
        if self.target_bytes is not None and self.target_bytes <= 0:
            raise ConfigError(f"--target-bytes is {self.target_bytes}; expected more than 0")
        if self.max_error is not None and not 0 < self.max_error < math.inf:
            raise ConfigError(f"--max-error is {self.max_error}; expected a number above 0, as 0.02")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """``nbytes`` of the whole file, ``error`` as predicted: the square root of the sum of the units' parts."""

    schemes: dict[str, str]
    nbytes: int
    error: float


def allocate(table: Table, size_of: SizeOf, budget: Budget) -> Allocation:
    """Raises: ConfigError where the budget cannot be met; the message says what can."""
    if budget.target_bytes is not None:
        return within_bytes(table, size_of, budget.target_bytes)
    assert budget.max_error is not None
    return within_error(table, size_of, budget.max_error)


def within_bytes(table: Table, size_of: SizeOf, target: int) -> Allocation:
    """The least error of what takes ``target`` bytes or up to 1 % less."""
    lowest = check_range(list(table), size_of, target)
    search = _Search(table)
    found, room = None, search.room(size_of, target)
    grid = search.grid(room)
    for cost, cell in grid.best_first():
        if cost > room:
            continue
        schemes = grid.schemes(cell)
        nbytes = size_of(schemes)
        if nbytes > target:  # with padding and header, which others of its size will have too
            room = cost - (nbytes - target)
            continue
        if nbytes >= (1 - MARGIN) * target:
            return _allocation(table, schemes, nbytes)
        if found is None or nbytes > found.nbytes:
            found = _allocation(table, schemes, nbytes)
    found = found or _allocation(table, dict.fromkeys(table, "int8"), lowest)
    if found.nbytes < (1 - MARGIN) * target:
        log.warning(
            "--target-bytes is %d; the nearest below it that this DiT's layers add up to is %d", target, found.nbytes
        )
    return found


def check_range(units: Sequence[str], size_of: SizeOf, target: int) -> int:
    """Bytes of uniform int8. Raises: ConfigError where ``target`` is less, or more than those of bf16."""
    lowest, highest = (size_of(dict.fromkeys(units, scheme)) for scheme in ("int8", "bf16"))
    if not lowest <= target <= highest:
        raise ConfigError(
            f"--target-bytes is {target}, but the DiT's file takes {lowest} bytes where all its Linears are int8 and "
            f"{highest} where all are bf16; expected a number between them"
        )
    return lowest


def within_error(table: Table, size_of: SizeOf, most: float) -> Allocation:
    """The fewest bytes whose predicted error is at most ``most``."""
    search = _Search(table)
    smallest = _allocation(table, search.smallest, size_of(search.smallest))
    if smallest.error <= most:
        return smallest
    best = _allocation(table, search.best, size_of(search.best))
    if best.error > most:
        raise ConfigError(
            f"--max-error is {most:g}, but the least that is predicted is {best.error:.3g}, with {best.nbytes} bytes, "
            f"and {smallest.error:.3g} with {smallest.nbytes}; give a number between them, or convert with --dit fp32"
        )
    schemes = search.grid(search.span).cheapest(smallest.error**2 - most**2)
    return best if schemes is None else _allocation(table, schemes, size_of(schemes))


def _allocation(table: Table, schemes: Schemes, nbytes: int) -> Allocation:
    parts = math.fsum(table[unit][scheme].error for unit, scheme in schemes.items())
    return Allocation(schemes=dict(schemes), nbytes=nbytes, error=math.sqrt(parts))


class _Search:
    """Each unit's schemes that are worth their bytes: from the smallest on, each with less error than those before."""

    def __init__(self, table: Table):
        self.steps = {unit: _worth(choices) for unit, choices in table.items()}
        self.table = table
        self.smallest = {unit: steps[0] for unit, steps in self.steps.items()}
        self.best = {unit: steps[-1] for unit, steps in self.steps.items()}

    @property
    def span(self) -> int:
        """Bytes from the smallest of each to the best of each."""
        return sum(self.cost(unit, scheme) for unit, scheme in self.best.items())

    def room(self, size_of: SizeOf, target: int) -> int:
        """Bytes beyond the smallest, without padding and header, that a file of ``target`` bytes has: in proportion, as
        the header becomes shorter with every unit that needs no scales."""
        smallest, best = size_of(self.smallest), size_of(self.best)
        return (target - smallest) * self.span // (best - smallest) if best > smallest else 0

    def cost(self, unit: str, scheme: str) -> int:
        """Bytes beyond the smallest."""
        return self.table[unit][scheme].nbytes - self.table[unit][self.smallest[unit]].nbytes

    def gain(self, unit: str, scheme: str) -> float:
        return self.table[unit][self.smallest[unit]].error - self.table[unit][scheme].error

    def grid(self, room: int) -> _Grid:
        return _Grid(self, max(room, 0))


def _worth(choices: Mapping[str, Choice]) -> list[str]:
    # Nothing is taken that errs more than int8: fp8 may save a few bytes of factors, and is slow on older cards.
    better = [scheme for scheme in choices if scheme == "int8" or choices[scheme].error < choices["int8"].error]
    ordered = sorted(better, key=lambda scheme: (choices[scheme].nbytes, choices[scheme].error, SCHEMES.index(scheme)))
    kept = ordered[:1]
    for scheme in ordered[1:]:
        if choices[scheme].error < choices[kept[-1]].error:
            kept.append(scheme)
    return kept


class _Grid:
    """The most that can be gained with so many cells of bytes, for every number of them up to the ``room``."""

    def __init__(self, search: _Search, room: int):
        self._search, self._cell = search, max(1, -(-room // CELLS))
        # Each unit's bytes are rounded, at the worst all of them up.
        count = room // self._cell + 1 + len(search.steps)
        self._gain: NDArray[np.float64] = np.full(count, -np.inf)
        self._gain[0] = 0.0
        # Bytes, of which the number of the cell is a rounded sum: at the worst too small by half a cell a unit.
        self._cost: NDArray[np.int64] = np.zeros(count, np.int64)
        self._taken: list[tuple[str, NDArray[np.uint8]]] = []
        for unit in search.steps:
            self._add(unit)

    def _cells(self, unit: str, scheme: str) -> int:
        return round(self._search.cost(unit, scheme) / self._cell)

    def _add(self, unit: str) -> None:
        before, taken = self._gain, np.zeros(len(self._gain), np.uint8)
        after, cost = before.copy(), self._cost.copy()
        for index, scheme in enumerate(self._search.steps[unit][1:], 1):
            cells, gain = self._cells(unit, scheme), self._search.gain(unit, scheme)
            if cells >= len(before):
                continue
            raised = np.full_like(before, -np.inf)
            raised[cells:] = before[: len(before) - cells] + gain
            better = raised > after
            after[better], taken[better] = raised[better], index
            spent = np.zeros_like(cost)
            spent[cells:] = self._cost[: len(before) - cells] + self._search.cost(unit, scheme)
            cost[better] = spent[better]
        self._gain, self._cost = after, cost
        self._taken.append((unit, taken))

    def schemes(self, cells: int) -> dict[str, str]:
        """Of so many cells, what gains most."""
        found = {}
        for unit, taken in reversed(self._taken):
            scheme = self._search.steps[unit][taken[cells]]
            found[unit] = scheme
            cells -= self._cells(unit, scheme)
        return {unit: found[unit] for unit in self._search.steps}

    def best_first(self) -> Iterator[tuple[int, int]]:
        """Bytes beyond the smallest, and in which cell: what gains most first; of what gains the same, what takes
        most."""
        for cell in np.lexsort((-self._cost, -self._gain)):
            if np.isfinite(self._gain[cell]):
                yield int(self._cost[cell]), int(cell)

    def cheapest(self, gain: float) -> dict[str, str] | None:
        """The fewest bytes that gain so much; None where nothing on the grid does."""
        enough = np.flatnonzero(self._gain >= gain)
        return self.schemes(int(enough[self._cost[enough].argmin()])) if len(enough) else None
