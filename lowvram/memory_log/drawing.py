"""Memory over time as one SVG: a panel a rank, its curves, its stages below, and what it was allowed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from lowvram.memory_log.rows import Row
from lowvram.pages.document import rendered

GIB = 2**30
WIDTH, HEIGHT = 900, 220
"""Of a panel's curves, in the drawing's own units."""
_POINTS = 900
_TEMPLATE = Path(__file__).with_name("memory.svg.j2")
_LANE = 16
_CURVES: tuple[tuple[str, str, Callable[[Row], int | None]], ...] = (
    ("reserved on the device", "reserved", lambda row: row.reserved),
    ("allocated on the device", "allocated", lambda row: row.allocated),
    ("resident set of the process", "rss", lambda row: row.rss),
    ("pinned host memory", "pinned", lambda row: row.pinned or None),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """``points`` of a polyline; ``highest`` in GiB."""

    name: str
    kind: str
    points: str
    highest: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lane:
    """A stage and the stretches (x, width) in which it ran."""

    name: str
    y: int
    stretches: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """``top`` is where it begins in the drawing, ``budget_y`` where the allowed bytes lie in it, None without."""

    title: str
    top: int
    height: int
    high: str
    seconds: str
    curves: tuple[Curve, ...]
    lanes: tuple[Lane, ...]
    budget_y: float | None
    budget: str


def draw(logs: Sequence[tuple[str, Sequence[Row]]], *, title: str, budgets: Sequence[int | None] = ()) -> str:
    """The drawing as text. ``logs`` are rows by name, one of each rank, of which none is empty; ``budgets`` are the
    bytes of its device that each may take, where that is known."""
    panels: list[Panel] = []
    for index, (name, rows) in enumerate(logs):
        top = panels[-1].top + panels[-1].height if panels else 40
        panels.append(_panel(name, rows, top, budgets[index] if index < len(budgets) else None))
    height = panels[-1].top + panels[-1].height + 10
    sizes = {"width": WIDTH, "plot": HEIGHT, "lane": _LANE, "height": height}
    return rendered(_TEMPLATE, {"title": title, "panels": panels, **sizes}, {})


def _panel(name: str, rows: Sequence[Row], top: int, budget: int | None) -> Panel:
    last = max(row.time_s for row in rows) or 1.0
    values = {kind: [(row.time_s, size) for row in rows if (size := of(row)) is not None] for _, kind, of in _CURVES}
    every = [size for points in values.values() for _, size in points] + ([budget] if budget else [])
    high = _round_up(max(every, default=GIB) / GIB)
    curves = tuple(
        Curve(name=label, kind=kind, points=_points(values[kind], last, high), highest=_highest(values[kind]))
        for label, kind, _ in _CURVES
        if values[kind]
    )
    lanes = _lanes(rows, last)
    return Panel(
        title=name,
        top=top,
        height=HEIGHT + 70 + _LANE * len(lanes) + 18 * len(curves),
        high=f"{high:g} GiB",
        seconds=f"{last:.1f} s",
        curves=curves,
        lanes=lanes,
        budget_y=None if budget is None else round(HEIGHT * (1 - budget / GIB / high), 1),
        budget="" if budget is None else f"allowed: {budget / GIB:.2f} GiB",
    )


def _points(values: Sequence[tuple[float, int]], last: float, high: float) -> str:
    """The highest of all that falls on one point of the width, so that no peak is lost."""
    at: dict[int, int] = {}
    for time_s, size in values:
        place = round(_POINTS * time_s / last)
        at[place] = max(at.get(place, 0), size)
    return " ".join(
        f"{WIDTH * place / _POINTS:.1f},{HEIGHT * (1 - size / GIB / high):.1f}" for place, size in sorted(at.items())
    )


def _highest(values: Sequence[tuple[float, int]]) -> float:
    return max(size for _, size in values) / GIB


def _lanes(rows: Sequence[Row], last: float) -> tuple[Lane, ...]:
    """What was begun and not ended goes to the end of the log: so it was when the run was stopped."""
    open_: dict[str, float] = {}
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.event == "begin":
            found.setdefault(row.stage, [])
            open_[row.stage] = row.time_s
        elif row.event == "end" and row.stage in open_:
            found[row.stage].append((open_.pop(row.stage), row.time_s))
    for stage, begin in open_.items():
        found[stage].append((begin, last))
    return tuple(
        Lane(name=stage, y=HEIGHT + 24 + _LANE * index, stretches=_stretches(spans, last))
        for index, (stage, spans) in enumerate(found.items())
    )


def _stretches(spans: Sequence[tuple[float, float]], last: float) -> tuple[tuple[float, float], ...]:
    """Those that nothing to be seen lies between are drawn as one: thousands of blocks are one bar."""
    drawn: list[list[float]] = []
    for begin, end in sorted(spans):
        left, right = WIDTH * begin / last, WIDTH * end / last
        if drawn and left - drawn[-1][1] < 0.5:
            drawn[-1][1] = max(drawn[-1][1], right)
        else:
            drawn.append([left, right])
    return tuple((round(left, 1), round(max(right - left, 0.5), 1)) for left, right in drawn)


def _round_up(gib: float) -> float:
    """To a number that an axis ends with."""
    if gib <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(gib))
    steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 15)
    return next(step * power for step in steps if step * power >= 1.02 * gib)
