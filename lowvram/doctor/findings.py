"""Findings of the checks."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Status = Literal["ok", "warning", "problem"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report. A warning costs speed, quality of life or luck; with a problem a run fails or hangs."""

    check: str
    status: Status
    found: str
    expected: str = ""
    advice: str = ""
    why: str = ""

    def text(self) -> str:
        """Everything but the status, in one line."""
        parts = [
            self.found,
            f"expected {self.expected}" if self.expected else "",
            self.advice,
            f"because {self.why}" if self.why else "",
        ]
        return " ".join(f"{self.check}: {'; '.join(part for part in parts if part)}".split())


def ok(check: str, found: str) -> Finding:
    return Finding(check=check, status="ok", found=found)


def warning(check: str, found: str, *, expected: str = "", advice: str, why: str) -> Finding:
    return Finding(check=check, status="warning", found=found, expected=expected, advice=advice, why=why)


def problem(check: str, found: str, *, expected: str = "", advice: str, why: str) -> Finding:
    return Finding(check=check, status="problem", found=found, expected=expected, advice=advice, why=why)


def to_json(findings: list[Finding]) -> dict[str, Any]:
    counts = {status: sum(finding.status == status for finding in findings) for status in ("problem", "warning")}
    return {
        "healthy": not counts["problem"],
        "problems": counts["problem"],
        "warnings": counts["warning"],
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
