"""A job: what was asked, and how far it is."""

from __future__ import annotations

import dataclasses
import math
import re
import secrets
from typing import Any

QUEUED, RUNNING, DONE, FAILED, CANCELLED, BROKEN = "queued", "running", "done", "failed", "cancelled", "broken off"
STATES = (QUEUED, RUNNING, DONE, FAILED, CANCELLED, BROKEN)
OPEN_STATES = (QUEUED, RUNNING)
"""Those that change by themselves."""
_ID = re.compile(r"[0-9a-f]{16}", re.ASCII)


def new_id() -> str:
    return secrets.token_hex(8)


def is_id(text: str) -> bool:
    """Whether it is one that ``new_id`` may give: nothing else becomes part of a path."""
    return _ID.fullmatch(text) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """``frames`` of ``total_frames`` stand in the video, None until their number is known; ``seconds`` since the job
    began, ``seconds_left`` by the pace of the latest blocks. ``memory`` is in bytes, by name, as of the latest block.
    """

    frames: int = 0
    total_frames: int | None = None
    seconds: float = 0.0
    seconds_left: float | None = None
    memory: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def share(self) -> float:
        """0 to 1."""
        return min(1.0, self.frames / self.total_frames) if self.total_frames else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """``settings`` are those of a ``Request`` but for its files; ``reason`` says why a job failed or was broken off.
    Times are seconds since 1970, None where it did not happen. ``version`` counts the changes, of this process."""

    id: str
    created: float
    settings: dict[str, Any]
    state: str = QUEUED
    reason: str = ""
    started: float | None = None
    ended: float | None = None
    progress: Progress = dataclasses.field(default_factory=Progress)
    version: int = 0

    def kept(self) -> dict[str, Any]:
        """What stands in the job's file."""
        facts = dataclasses.asdict(self)
        del facts["version"]
        return facts

    @classmethod
    def read(cls, facts: Any, name: str) -> Job:
        """Of what ``kept`` gave, of the job in the folder ``name``.

        Raises:
            ValueError: it is something else.
        """
        try:
            job = cls(**{**facts, "progress": Progress(**facts["progress"])})
            numbers = [job.created, *(time for time in (job.started, job.ended) if time is not None)]
            sound = job.id == name and job.state in STATES and isinstance(job.settings, dict)
            sound = sound and isinstance(job.reason, str) and all(math.isfinite(number) for number in numbers)
        except (TypeError, KeyError) as error:
            raise ValueError(f"it is no job's ({error})") from error
        if not sound:
            raise ValueError("it is of another job, or of a state that is not known")
        return job
