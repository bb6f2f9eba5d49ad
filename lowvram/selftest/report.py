"""Report of an examination: a table for people, JSON for machines, a text to paste into a bug report."""

from __future__ import annotations

import dataclasses
import getpass
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lowvram.selftest.cache import Identity
from lowvram.selftest.results import Result, Verdict, judge
from lowvram_kernels.errors import OutputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examined:
    """One device and its results."""

    device: torch.device
    identity: Identity
    results: Sequence[Result]

    @property
    def verdict(self) -> Verdict:
        return judge(self.results)

    def to_json(self) -> dict[str, Any]:
        verdict = self.verdict
        return {
            "device": str(self.device),
            "identity": dataclasses.asdict(self.identity),
            "checks": [result.to_json() for result in self.results],
            "switched_off": [dataclasses.asdict(one) for one in verdict.off],
            "preferred": [dataclasses.asdict(one) for one in verdict.preferred],
            "stuck": [result.subject.name for result in verdict.stuck],
        }


def print_examined(examined: Examined, console: Console) -> None:
    """A row a check, and below what follows from them."""
    table = Table(title=f"{examined.device}: {examined.identity.device}", title_justify="left")
    for column in ("check", "result", "error", "bound", "ms"):
        table.add_column(column, justify="left" if column in ("check", "result") else "right", overflow="fold")
    colours = {"passed": "green", "failed": "red", "skipped": "yellow"}
    for result in examined.results:
        shown = f"[{colours[result.status]}]{result.status}[/]"
        table.add_row(result.subject.name, shown, _short(result.error), _short(result.bound), _short(_ms(result)))
    console.print(table)
    for line in lines_of(examined):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def lines_of(examined: Examined) -> list[str]:
    """What is more than a row: failures, figures, and the verdict."""
    verdict = examined.verdict
    lines = [
        f"{result.status}: {result.subject.name}: {' '.join(result.message.split())}"
        for result in examined.results
        if result.status != "passed"
    ]
    for result in examined.results:
        if result.figures:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in result.figures.items())
            lines.append(f"measured: {result.subject.name}: {figures}")
    lines += [f"off: {one}; {one.advice}" for one in verdict.off]
    lines += [f"preferred: {one.operation}: {one.backend}, {one.reason}" for one in verdict.preferred]
    lines += [f"no way around: {result.subject.name}" for result in verdict.stuck]
    passed = sum(result.status == "passed" for result in examined.results)
    return [*lines, f"{examined.device}: {passed} of {len(examined.results)} checks passed"]


def bug_report(all_examined: Sequence[Examined], note: str = "") -> str:
    """Versions, device and all that did not pass, without the user's name and folders."""
    lines = [f"lowvram selftest on {platform.system()} {platform.release()}, Python {platform.python_version()}"]
    lines += [note] if note else []
    for examined in all_examined:
        lines += ["", f"{examined.device}: {examined.identity.key}", *lines_of(examined)]
    return without_user("\n".join(lines) + "\n")


def without_user(text: str) -> str:
    """The home folder as "~", the folder that is worked in as ".", the user's name as "user"."""
    home, here = str(Path.home()), str(Path.cwd())
    for path, sign in sorted([(home, "~"), (here, ".")], key=lambda pair: -len(pair[0])):
        text = text.replace(path, sign) if len(path) > 1 else text
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user without an entry, as in some containers
        return text
    return text.replace(f"/{name}/", "/user/")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _ms(result: Result) -> float | None:
    return None if result.seconds is None else result.seconds * 1000


def write_text(path: Path, text: str) -> None:
    """Raises: OutputError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error}; choose another place") from error
