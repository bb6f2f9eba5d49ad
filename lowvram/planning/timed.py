"""Operations a second that kernels reached on a card at the model's shapes: kept by the selftest, read by plans.

They lie beside the card's rates in the user's cache folder and take the place of a share of a peak, see
``operation_rates``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lowvram.planning.measured import cache_folder, read_cache, write_cache
from lowvram.planning.operation_rates import OPERATION_RATES

_WHAT = "rates of operations"
Timed = tuple[tuple[str, float], ...]


def timed_file() -> Path:
    return cache_folder() / "timed.json"


def timed_on(card_key: str, *, file: Path | None = None) -> Timed:
    """Pairs of an operation's name and what it did in a second on this card; none where nothing was timed."""
    return _read(file or timed_file()).get(card_key, ())


def keep_timed(card_key: str, rates: Mapping[str, float], *, file: Path | None = None) -> None:
    """Replace what is known of a card; nothing is written where nothing was timed."""
    if rates:
        file = file or timed_file()
        every = {key: dict(timed) for key, timed in _read(file).items()}
        write_cache(file, _WHAT, every | {card_key: dict(rates)})


def _read(file: Path) -> dict[str, Timed]:
    return read_cache(file, _WHAT, _timed)


def _timed(stored: Mapping[str, float]) -> Timed:
    for name, rate in stored.items():
        if name not in OPERATION_RATES or isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0:
            raise ValueError(f"{name} is {rate!r}; expected an operation that is known, and a rate above 0")
    return tuple(sorted(stored.items()))
