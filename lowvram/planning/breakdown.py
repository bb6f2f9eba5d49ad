"""Where the seconds of a block go: a row for each task of a rank, with what its rate is taken to be and where from."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from lowvram.planning.block_tasks import Lane, Task
from lowvram.planning.operation_rates import BOUNDS, Bound, Range
from lowvram.planning.timing import Seconds

_TOGETHER: tuple[tuple[tuple[Lane, ...], str], ...] = (
    (("linear", "weights"), "less the shorter of Linears and their reading"),
    (("attention", "exp2", "instructions", "rings"), "less all but the longest of attention"),
    (("between",), ""),
    (("exchange", "in", "out", "host"), "less what goes on beside the card, or the card beside it"),
    (("exposed", "decode"), ""),
)
"""Lanes in the order of the table, and what is said of those seconds of a group that hide behind others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """``seconds`` low, expected and high; ``peak`` what its rate is a share of, a second, and ``each`` how much of that
    one of what is counted takes. Those of an overlap have seconds alone, below 0."""

    name: str
    seconds: tuple[float, float, float]
    peak: float | None = None
    reached: Range | None = None
    each: Range | None = None
    is_share: bool = True
    source: str = ""

    @property
    def overlap(self) -> bool:
        return self.reached is None

    def to_json(self) -> dict[str, Any]:
        low, expected, high = self.seconds
        said = {"operation": self.name, "seconds": {"low": low, "expected": expected, "high": high}}
        if self.reached is None:
            return said
        figures = {"share" if self.is_share else "seconds_each": dataclasses.asdict(self.reached)}
        each = {"each": dataclasses.asdict(self.each)} if self.each else {}
        return said | {"peak_per_second": self.peak} | figures | each | {"source": self.source}


def rows_of_tasks(tasks: Sequence[Task]) -> list[Row]:
    """A row a task, and behind each group of those that run at once one of negative seconds, for what hides behind the
    others: together they are the block's seconds, low, expected and high."""
    rows: list[Row] = []
    for lanes, said in _TOGETHER:
        group = [task for task in tasks if task.lane in lanes]
        rows += [_row(task) for task in group]
        hidden = _three(_hidden(tasks, group, lanes, bound) for bound in BOUNDS)
        if said and any(hidden):
            rows.append(Row(name=said, seconds=hidden))
    return rows


def _row(task: Task) -> Row:
    return Row(
        name=task.name,
        seconds=_three(task.seconds(bound) for bound in BOUNDS),
        peak=task.peak if task.reached.per_second else None,
        reached=task.reached.figures,
        each=task.each.figures if task.each else None,
        is_share=task.reached.per_second,
        source=task.reached.source,
    )


def _hidden(tasks: Sequence[Task], group: Sequence[Task], lanes: Sequence[Lane], bound: Bound) -> float:
    """Seconds, 0 or below, that the group's tasks do not add to the block."""
    added = sum(task.seconds(bound) for task in group)
    found = Seconds.of(tasks, bound)
    if "host" in lanes:  # beside the card's own work, which stands above
        return found.block - found.exposed - found.decode - found.arithmetic - added
    return Seconds.of(group, bound).arithmetic - added if "linear" in lanes or "attention" in lanes else 0.0


def _three(values: Iterable[float]) -> tuple[float, float, float]:
    low, expected, high = values
    return low, expected, high


def shown(values: Sequence[float], step: float = 0.001) -> list[float]:
    """Each to a whole number of steps, so that they add up to their sum in whole steps: what is shown adds up."""
    ends = [round(total / step) for total in itertools.accumulate(values, initial=0.0)]
    return [(end - begin) * step for begin, end in itertools.pairwise(ends)]


def breakdown_table(rows: Sequence[Row], title: str) -> Table:
    """Milliseconds, which add up as they stand."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for column in ("low", "expected, ms", "high"):
        table.add_column(column, justify="right")
    table.add_column("of its peak", justify="right")
    table.add_column("known from")
    columns = [shown([row.seconds[place] for row in rows]) for place in range(len(BOUNDS))]
    for row, *values in zip(rows, *columns, strict=True):
        table.add_row(row.name, *(f"{value * 1000:.0f}" for value in values), _figures(row), row.source)
    table.add_row("a block", *(f"{sum(column) * 1000:.0f}" for column in columns), style="bold")
    return table


def _figures(row: Row) -> str:
    if row.reached is None:
        return ""
    scale, unit = (100, " %") if row.is_share else (1e6, " us each")
    each = f"; {_ranged(row.each, 1, '')} each" if row.each else ""
    return _ranged(row.reached, scale, unit) + each


def _ranged(figures: Range, scale: float, unit: str) -> str:
    least, expected, most = (f"{value * scale:.0f}" for value in dataclasses.astuple(figures))
    return f"{expected}{unit} ({least} to {most})" if least != most else f"{expected}{unit}"
