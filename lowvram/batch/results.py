"""Results of a batch: what became of each job, in files that are written anew whenever one changes, and as a table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowvram_kernels.errors import InputError, OutputError

State = Literal["waiting", "under way", "made", "there", "refused", "changed", "failed", "cut"]
GOOD = ("made", "there")
_COLOURS = {"made": "green", "there": "green", "waiting": "default", "under way": "default"}
_KEY = "lowvram_batch"
FILES = ("results.json", "results.csv")


@dataclasses.dataclass(kw_only=True)
class Result:
    """Of one job: ``place`` in the list, from 1 on; ``reason`` why it is not made; of one that is made, or was there,
    its files, frames, length in s, and seconds that it took."""

    place: int
    name: str
    state: State = "waiting"
    reason: str = ""
    video: str = ""
    report: str = ""
    frames: int | None = None
    length_s: float | None = None
    seconds: float | None = None
    frames_per_second: float | None = None


@dataclasses.dataclass(kw_only=True)
class Results:
    """Of all jobs, in their order, in ``folder``."""

    folder: Path
    jobs: list[Result]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether every job is made."""
        return all(job.state in GOOD for job in self.jobs)

    def to_json(self) -> dict[str, Any]:
        counts = Counter(job.state for job in self.jobs)
        return {_KEY: 1, **self.facts, "counts": dict(counts), "jobs": [dataclasses.asdict(job) for job in self.jobs]}

    def save(self) -> None:
        """Raises: OutputError; what was written before is whole."""
        _write(self.folder / FILES[0], json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, [field.name for field in dataclasses.fields(Result)])
        table.writeheader()
        table.writerows(dataclasses.asdict(job) for job in self.jobs)
        _write(self.folder / FILES[1], text.getvalue())

    def show(self, console: Console) -> None:
        """As a table, and how many became what."""
        table = Table("job", "state", "frames", "length", "took", "frames/s", box=None)
        table.add_column("video, or why not", overflow="fold")
        for job in self.jobs:
            colour = _COLOURS.get(job.state, "red")
            table.add_row(
                escape(f"{job.place} {job.name}"),
                f"[{colour}]{job.state}[/]",
                _number(job.frames, "d"),
                _number(job.length_s, ".1f", " s"),
                _number(job.seconds, ".1f", " s"),
                _number(job.frames_per_second, ".2f"),
                escape(os.path.relpath(job.video, self.folder) if job.state in GOOD else job.reason),
            )
        console.print(table)
        counts = Counter(job.state for job in self.jobs)
        said = ", ".join(f"{count} {state}" for state, count in counts.items())
        console.print(f"{said}, in {escape(str(self.folder))}", highlight=False, soft_wrap=True)


def unfinished(folder: Path, *, overwrite: bool) -> set[str]:
    """Videos that an earlier batch in ``folder`` was making when it was cut.

    Raises:
        InputError: files of these names that no batch has written.
    """
    there = [folder / name for name in FILES if os.path.lexists(folder / name)]
    try:
        found = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
        if _KEY in found:
            return {job["video"] for job in found["jobs"] if job["state"] in ("under way", "cut")}
    except (OSError, ValueError, TypeError, KeyError):
        pass
    if there and not overwrite:
        raise InputError(
            f"{there[0]} is there already, and no results of lowvram batch; name another folder, or replace it: "
            "--overwrite"
        )
    return set()


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror or error}); free some space there") from error
