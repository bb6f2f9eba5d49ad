"""Results of checks, and the form in which they travel between processes and lie in the cache."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What a check examines: ``operation`` and ``backend`` as the run's report calls them, both "" where it is no
    kernel; ``size`` "small" or "14B"."""

    name: str
    operation: str = ""
    backend: str = ""
    size: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """``error`` and ``bound`` of the judgement nearest to failing; ``seconds`` of one call, where it was timed;
    ``figures`` are what else was measured, by name with its unit."""

    subject: Subject
    status: Status
    message: str = ""
    error: float | None = None
    bound: float | None = None
    seconds: float | None = None
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: Any) -> Result:
        """Raises: ValueError, TypeError or KeyError where this is not what ``to_json`` gave."""
        values = dict(stored)
        subject = Subject(**values.pop("subject"))
        result = cls(subject=subject, **values)
        if result.status not in ("passed", "failed", "skipped"):
            raise ValueError(f"status is {result.status!r}, expected passed, failed or skipped")
        texts = (*dataclasses.astuple(subject), result.message)
        numbers = (result.error, result.bound, result.seconds, *result.figures.values())
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"names and message are {texts!r}, expected texts")
        if not all(n is None or (isinstance(n, (int, float)) and not isinstance(n, bool)) for n in numbers):
            raise ValueError(f"figures are {numbers!r}, expected numbers")
        return result
