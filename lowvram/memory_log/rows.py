"""Rows of a memory log, as a run writes them and as ``nvidia-smi`` does."""

from __future__ import annotations

import csv
import dataclasses
import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path

from lowvram_kernels.errors import InputError

MIB = 2**20
EVENTS = ("sample", "begin", "end")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One moment of one rank. Bytes, None where nobody counts them: ``allocated`` by tensors and ``reserved`` by
    torch's allocator, ``free`` on the device, ``rss`` of the process, ``pinned`` host memory.

    ``event``: a "sample", the "begin" of a stage, or its "end", whose bytes are the highest since its begin (``free``
    and ``pinned`` are those of the moment). ``stage`` is "" between two stages, ``block`` None before the first.
    """

    time_s: float
    rank: int = 0
    stage: str = ""
    block: int | None = None
    event: str = "sample"
    allocated: int | None = None
    reserved: int | None = None
    free: int | None = None
    rss: int | None = None
    pinned: int | None = None

    def cells(self) -> list[str]:
        values = [f"{self.time_s:.3f}", *dataclasses.astuple(self)[1:]]
        return ["" if value is None else str(value) for value in values]


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
_CARDS = ("index", "uuid", "gpu_uuid", "pci.bus_id", "gpu_bus_id", "serial", "gpu_serial")
"""Columns of nvidia-smi that tell a card from another."""
_NUMBERS = ("block", "allocated", "reserved", "free", "rss", "pinned")


def read_rows(path: Path) -> list[Row]:
    """The rows of a log, or of ``nvidia-smi --query-gpu=timestamp,memory.used --format=csv``, in their order.

    A last line without its end, as a kill leaves it, is left out: half of a number is one, too.

    Raises:
        InputError: no such file, another kind of file, or no row.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; name a memory log") from error
    lines = [[cell.strip() for cell in line] for line in csv.reader(text[: text.rfind("\n") + 1].splitlines()) if line]
    if not lines:
        raise InputError(f"{path} is empty; expected the rows of --memory-log, or of nvidia-smi as CSV")
    head, body = lines[0], lines[1:]
    if head == list(COLUMNS):
        rows = list(_own(path, body))
    elif [name.split(" ")[0] for name in head[:2]] == ["timestamp", "memory.used"]:
        rows = list(_smi(path, head, body))
    else:
        raise InputError(
            f"{path} begins with {','.join(head)[:80]}; expected {','.join(COLUMNS)}, as --memory-log writes, or "
            "timestamp,memory.used, as of nvidia-smi --query-gpu=timestamp,memory.used --format=csv"
        )
    if not rows:
        raise InputError(f"{path} has no row behind its first line: there is nothing to draw")
    return rows


def _own(path: Path, body: Sequence[Sequence[str]]) -> Iterator[Row]:
    for number, line in enumerate(body, 2):
        try:
            given = dict(zip(COLUMNS, line, strict=True))
            if given["event"] not in EVENTS:
                raise ValueError(f"event {given['event']!r}")
            counts = {name: int(given[name]) if given[name] else None for name in _NUMBERS}
            stage, event = given["stage"], given["event"]
            yield Row(time_s=float(given["time_s"]), rank=int(given["rank"]), stage=stage, event=event, **counts)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}; expected a row of --memory-log") from error


def _smi(path: Path, head: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[Row]:
    """One card's; bytes used by everybody stand as ``reserved``.

    Raises:
        InputError: rows of several cards, as far as a column says so, or a row that is none.
    """
    for place, name in enumerate(head):
        cards = {line[place] for line in body if len(line) > place}
        if name in _CARDS and len(cards) > 1:
            raise InputError(
                f"{path} has rows of {len(cards)} cards by its column {name}; expected one: ask nvidia-smi with -i 0, "
                "-i 1 and so on, a file each"
            )
    unit = 1 if "[B]" in head[1] else MIB
    begin: datetime.datetime | None = None
    for number, line in enumerate(body, 2):
        try:
            moment = datetime.datetime.fromisoformat(line[0].replace("/", "-"))
            begin = begin or moment
            used, *named = line[1].split()
            size = {"": unit, "MiB": MIB, "KiB": 2**10, "GiB": 2**30, "B": 1}[named[0] if named else ""]
            yield Row(time_s=(moment - begin).total_seconds(), reserved=int(float(used) * size))
        except (ValueError, IndexError, KeyError) as error:
            raise InputError(
                f"{path}, line {number}: {','.join(line)[:80]}; expected a time as 2026/01/31 12:00:00.000 and memory "
                "as 1234 MiB"
            ) from error
