"""Mixed precision of the DiT: what each unit's schemes cost is measured, and chosen from within a budget.

What a scheme does to a weight is measured: the squared relative error of the weight. What that does to the picture
differs by orders of magnitude between kinds of Linears: it is measured on a run of the int8 artifact, or else taken
from ``SENSITIVITY``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowvram_quantize.allocation import Allocation, Budget, Schemes, allocate, check_range
from lowvram_quantize.components import ComponentPlan
from lowvram_quantize.layout import file_bytes
from lowvram_quantize.sensitivity import SENSITIVITY, role_of
from lowvram_quantize.units import SCHEMES, Choice, Int8, mixed, stored_bytes, units_of, weight_errors
from lowvram_quantize.writer import disk_errors

log = logging.getLogger(__name__)

JOURNAL = "dit.errors"
"""Of an unfinished artifact: what was measured so far."""

Progress = Callable[[int, str], None]
"""Told of each weight's source bytes when it was measured, and in which slab it goes."""
Errors = Mapping[str, Mapping[str, float]]
"""Weight -> scheme -> squared relative error."""


def check_budget(plan: ComponentPlan, budget: Budget, int8: Int8) -> None:
    """Before anything is measured. Raises: ConfigError for bytes that no choice takes."""
    if budget.target_bytes is not None:
        check_range(list(units_of(plan.items)), _size_of(plan, int8), budget.target_bytes)


def choose(
    plan: ComponentPlan,
    budget: Budget,
    int8: Int8,
    folder: Path,
    fingerprint: str,
    progress: Progress,
    parts: Mapping[str, float] | None = None,
) -> ComponentPlan:
    """The DiT that ``plan`` would convert to int8, with its Linears in what is best within the budget.

    Args:
        int8: how int8 Linears are stored.
        folder: of the unfinished artifact, where what was measured is kept for the next run.
        fingerprint: of everything that decides it.
        progress: called for each weight.
        parts: by unit what its int8 adds to the square of the relative error of the output, where that was measured.

    Raises:
        ConfigError: the budget cannot be met.
        CheckpointError: a value is NaN or infinite, or the source cannot be read.
        OutputError: the folder cannot be written.
    """
    errors = measured(plan, int8, folder / JOURNAL, fingerprint, progress)
    table = {}
    for unit, items in units_of(plan.items).items():
        of = {scheme: sum(errors[item.name][scheme] for item in items) / len(items) for scheme in SCHEMES}
        sensitivity = SENSITIVITY[role_of(unit)]
        if parts is not None and unit in parts and of["int8"]:
            sensitivity = parts[unit] / of["int8"]
        table[unit] = {
            scheme: Choice(sum(stored_bytes(plan, item, scheme, int8) for item in items), sensitivity * of[scheme])
            for scheme in SCHEMES
        }
    found = allocate(table, _size_of(plan, int8), budget)
    log.info("the DiT's units: %s; predicted error %.3g", dict(Counter(found.schemes.values())), found.error)
    return dataclasses.replace(_stored(plan, found.schemes, int8), choice=_facts(budget, found, table, parts))


def measured(plan: ComponentPlan, int8: Int8, journal: Path, fingerprint: str, progress: Progress) -> Errors:
    """Errors of all weights that there is a choice for; those in the journal are not measured again."""
    items = [item for own in units_of(plan.items).values() for item in own]
    with disk_errors(journal, 0):
        found = _read(journal, fingerprint)
        if not found:
            journal.write_text(fingerprint + "\n", encoding="utf-8")
    for item in items:
        if item.name not in found:
            found[item.name] = weight_errors(item, plan.deltas.get(item.name), int8)
            with disk_errors(journal, 0), journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps([item.name, found[item.name]]) + "\n")
        progress(item.ref.nbytes, item.slab)
    return found


def _read(journal: Path, fingerprint: str) -> dict[str, dict[str, float]]:
    """What an interrupted run has measured; nothing where it was of something else. What was cut short is cut off."""
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    if not lines or lines[0] != f"{fingerprint}\n".encode():
        return {}
    found: dict[str, dict[str, float]] = {}
    kept = len(lines[0])
    for line in lines[1:]:
        try:
            name, errors = json.loads(line if line.endswith(b"\n") else b"")
        except ValueError:
            break
        found[name], kept = errors, kept + len(line)
    with journal.open("r+b") as file:
        file.truncate(kept)
    return found


def _size_of(plan: ComponentPlan, int8: Int8) -> Callable[[Schemes], int]:
    return lambda schemes: file_bytes(_stored(plan, schemes, int8))


def _stored(plan: ComponentPlan, schemes: Schemes, int8: Int8) -> ComponentPlan:
    names = {item.name: schemes[unit] for unit, items in units_of(plan.items).items() for item in items}
    return mixed(plan, names, int8)


def _facts(
    budget: Budget, found: Allocation, table: Mapping[str, Mapping[str, Choice]], parts: Mapping[str, float] | None
) -> dict[str, Any]:
    """For the manifest: what was asked, what is predicted, and of each unit what it is stored as and what its schemes
    would add to the square of the error."""
    return {
        "target_bytes": budget.target_bytes,
        "max_error": budget.max_error,
        "predicted_error": found.error,
        "measured": parts is not None,
        "units": {
            unit: {"scheme": found.schemes[unit], "error_parts": {s: choice.error for s, choice in choices.items()}}
            for unit, choices in table.items()
        },
    }
