"""Curves as what a page draws: points of an SVG in a box of fixed size, with what stands beside the axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

WIDTH, HEIGHT = 720, 120
"""Of the drawing, in its own units."""
_MOST_POINTS = 1500
_ROW = 18.0
"""Of a heat map, in the same units."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A curve over time or over a count. ``lines`` are runs of points "x,y x,y", broken where there is no value to
    draw; ``bars`` instead of them where there are few values. ``span`` is what the width means, for a cursor."""

    title: str
    unit: str
    low: str
    high: str
    first: str
    last: str
    span: float
    lines: tuple[str, ...] = ()
    bars: tuple[tuple[float, float, float, float], ...] = ()
    note: str = ""


def over_time(
    title: str,
    unit: str,
    values: Sequence[float],
    fps: float,
    worst: Callable[[Sequence[float]], float],
    note: str = "",
) -> Chart:
    """A value a frame. Of more frames than are drawn, each point is the ``worst`` of its own. Infinite values, as the
    PSNR of identical frames is, are gaps."""
    group = math.ceil(len(values) / _MOST_POINTS) or 1
    points = [worst(values[start : start + group]) for start in range(0, len(values), group)]
    low, high = _range(points)
    runs: list[list[str]] = [[]]
    for place, value in enumerate(points):
        if math.isfinite(value):
            x = WIDTH * (place * group) / max(len(values) - 1, 1)
            runs[-1].append(f"{x:.1f},{HEIGHT * (1 - (value - low) / (high - low)):.1f}")
        elif runs[-1]:
            runs.append([])
    seconds = (len(values) - 1) / fps
    return Chart(
        title=title,
        unit=unit,
        low=_short(low),
        high=_short(high),
        first="0 s",
        last=f"{seconds:.1f} s",
        span=seconds,
        lines=tuple(" ".join(run) for run in runs if run),
        note=note,
    )


def over_count(title: str, unit: str, values: Sequence[float], what: str, note: str = "") -> Chart:
    """A bar for each of ``values``, from 0 on: of blocks, of steps, of layers."""
    high = max((value for value in values if math.isfinite(value)), default=0.0) or 1.0
    step = WIDTH / max(len(values), 1)
    gap = min(2.0, step / 4)
    bars = []
    for place, value in enumerate(values):
        tall = HEIGHT * min(value / high, 1.0) if math.isfinite(value) else HEIGHT
        bars.append((round(place * step, 2), round(HEIGHT - tall, 2), round(step - gap, 2), round(tall, 2)))
    return Chart(
        title=title, unit=unit, low="0", high=_short(high), first=f"{what} 0", last=f"{what} {len(values) - 1}",
        span=len(values), bars=tuple(bars), note=note,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A rectangle of a heat map; ``strength`` 0 (the lowest value) to 1, ``said`` is its text for a pointer."""

    x: float
    y: float
    width: float
    height: float
    strength: float
    said: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Values of ``rows`` over ``columns`` numbered columns, in a box of ``WIDTH`` by ``height``."""

    title: str
    rows: tuple[str, ...]
    columns: int
    height: float
    low: str
    high: str
    cells: tuple[Cell, ...]
    note: str = ""


def heat_map(
    title: str, columns: int, values: Mapping[tuple[str, int], float], written: Callable[[float], str], note: str = ""
) -> HeatMap:
    """A cell for each of ``values``, by row and column, stronger with the value's logarithm; rows in the order in which
    they come first. Values that are not above 0 are weakest, infinite ones strongest."""
    rows = tuple(dict.fromkeys(row for row, _ in values))
    drawn = [value for value in values.values() if 0 < value < math.inf]
    low, high = min(drawn, default=1.0), max(drawn, default=1.0)
    wide = WIDTH / max(columns, 1)
    cells = []
    for (row, column), value in values.items():
        strength = math.log(max(value, low) / low) / math.log(high / low) if high > low else float(value >= high)
        cells.append(
            Cell(
                x=round(column * wide, 2),
                y=rows.index(row) * _ROW,
                width=round(wide - min(1.0, wide / 8), 2),
                height=_ROW - 1,
                strength=round(min(strength, 1.0), 3),
                said=f"{row}, {column}: {written(value)}",
            )
        )
    return HeatMap(
        title=title, rows=rows, columns=columns, height=len(rows) * _ROW, low=written(low), high=written(high),
        cells=tuple(cells), note=note,
    )  # fmt: skip


def _range(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _short(value: float) -> str:
    return f"{value:.4g}"
