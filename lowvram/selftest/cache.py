"""Results of earlier examinations, in the user's cache folder beside the cards' rates."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowvram.planning.measured import cache_folder, read_cache, write_cache
from lowvram.selftest.results import Result

_WHAT = "results of checks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """Of one device; ``complete`` where no check was left out."""

    results: tuple[Result, ...] = ()
    complete: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"complete": self.complete, "results": [one.to_json() for one in self.results]}


def cache_file() -> Path:
    return cache_folder() / "selftest.json"


def read(file: Path) -> dict[str, Known]:
    """What is known of each device by its identity's key; nothing, and one line of why, where the file is damaged."""
    return read_cache(file, _WHAT, _known)


def write(file: Path, known: Mapping[str, Known]) -> None:
    """Replace the file; where it cannot be written that is said and does no harm."""
    write_cache(file, _WHAT, {key: each.to_json() for key, each in known.items()})


def _known(stored: dict[str, Any]) -> Known:
    if not isinstance(stored["complete"], bool) or not isinstance(stored["results"], list):
        raise ValueError(f"expected complete and results, got {sorted(stored)}")
    return Known(results=tuple(Result.from_json(one) for one in stored["results"]), complete=stored["complete"])


@contextlib.contextmanager
def alone(file: Path) -> Iterator[None]:
    """Wait until no other process is in here: ranks that begin at once examine a card once, and the others read.

    The lock goes with its process, so that one that dies holds nobody up. Where there are no such locks, all go on.
    """
    try:
        import fcntl

        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.with_suffix(".lock").open("w")
    except (ImportError, OSError):
        yield
        return
    with lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
