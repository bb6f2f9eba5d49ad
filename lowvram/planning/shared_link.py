"""Link that cards of a machine share: what copies reach while all of them copy at once.

Kept apart from a card's own rates, under a key that says how many they were: a run on one card does not meet it, a run
on several streams under it all the time.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowvram.planning.cards import Rates
from lowvram.planning.measure import COPY_BYTES, Runner
from lowvram.planning.measured import cache_folder, read_cache, write_cache

# Some tenths of a second each way: ranks do not begin at one moment, and the middle one of so many is contended.
_COPIES = 25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copies:
    """Bytes a second."""

    h2d: float
    d2h: float

    def __post_init__(self) -> None:
        for value in (self.h2d, self.d2h):
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"a rate of copies is {value!r}, expected bytes a second above 0")


def contended_rates(
    rates: Rates, cards: int, runner: Runner, meet: Callable[[bool], bool], *, file: Path | None = None
) -> Rates:
    """``rates`` with the copies that one of ``cards`` cards of this machine reaches while all of them copy.

    ``meet`` tells the other ranks whether this one knows them already, waits for all, and says whether all of them do:
    only then nobody measures.
    """
    file = file or cache_folder() / "contended.json"
    key = f"{runner.key} | {cards} cards at once"
    known = _read(file)
    if not meet(key in known):
        known = _read(file) | {key: _measure(runner)}
        # All ranks of a machine write: whoever does so last has read the keys of other cards before.
        write_cache(file, "rates", {name: dataclasses.asdict(copies) for name, copies in known.items()})
    return dataclasses.replace(rates, **dataclasses.asdict(known[key]))


def _measure(runner: Runner) -> Copies:
    taken: dict[str, list[float]] = {"h2d": [], "d2h": []}
    for what, seconds in taken.items():
        seconds.extend(runner.seconds(what) for _ in range(_COPIES))
    return Copies(**{what: COPY_BYTES / statistics.median(seconds) for what, seconds in taken.items()})


def _read(file: Path) -> dict[str, Copies]:
    def parse(values: dict[str, Any]) -> Copies:
        return Copies(**values)

    return read_cache(file, "rates", parse)
