"""What ``lowvram report`` draws: a run's report with the logs of its ranks, or logs alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowvram.memory_log.drawing import draw
from lowvram.memory_log.rows import Row, read_rows
from lowvram.pages.document import write_text
from lowvram_kernels.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """A drawing's title, and by panel: its name, its rows, and the bytes of its device that it was allowed."""

    title: str
    logs: list[tuple[str, list[Row]]]
    budgets: list[int | None]


def gathered(files: Sequence[Path]) -> Drawn:
    """Of reports (``infer --report``, which name the logs) and logs, in their order.

    Raises:
        InputError: a file that is neither, or a report of a run without a log.
    """
    found = Drawn(title=f"Memory of {', '.join(file.stem for file in files)}", logs=[], budgets=[])
    for file in files:
        if file.suffix.lower() == ".json":
            _take_report(file, found)
        else:
            found.logs.append((file.name, read_rows(file)))
            found.budgets.append(None)
    return found


def write_drawing(files: Sequence[Path], out: Path) -> None:
    """Raises: InputError as of ``gathered``; OutputError where ``out`` cannot be written."""
    found = gathered(files)
    write_text(draw(found.logs, title=found.title, budgets=found.budgets), out)


def _take_report(file: Path, into: Drawn) -> None:
    report = _read(file)
    if not report.get("memory_log"):
        raise InputError(f"{file} is of a run without a memory log; make the video again with --memory-log FILE.csv")
    ranks = report.get("ranks") or [{"memory": report.get("memory"), "device": report.get("device")}]
    for facts in ranks:
        # Where it was written, or beside the report, where both were taken elsewhere.
        named = Path(facts.get("memory_log") or report["memory_log"])
        path = named if named.is_file() else file.with_name(named.name)
        if not path.is_file() and len(ranks) > 1 and into.logs:
            continue  # on another machine
        into.logs.append((_name(facts), read_rows(path)))
        into.budgets.append(_budget(facts))


def _read(file: Path) -> dict[str, Any]:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}; name a run's report") from error
    except ValueError as error:
        raise InputError(f"{file} is no JSON ({error}); expected what infer --report wrote") from error
    if not isinstance(report, dict) or "stages" not in report:
        raise InputError(f"{file} is no run's report; expected what infer --report wrote, or a memory log")
    return report


def _name(facts: dict[str, Any]) -> str:
    role = f"{facts['role']}, " if facts.get("role") else ""
    return f"{role}{facts.get('device') or 'device'}"


def _budget(facts: dict[str, Any]) -> int | None:
    plan = (facts.get("memory") or {}).get("plan") or {}
    budget = plan.get("vram_budget_bytes")
    return budget if isinstance(budget, int) else None
