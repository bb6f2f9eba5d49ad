"""Results of checks, in the form in which they travel between processes and lie in the cache; and the verdict on a
card: which kernels go, which are preferred, and what nothing can go around."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch

from lowvram.offload.replaying import trust
from lowvram_kernels.choices import OPERATIONS, RIVALS, prefer, switch_off

log = logging.getLogger(__name__)

Status = Literal["passed", "failed", "skipped"]
REPLAYS = "tiny model: layers replayed as CUDA graphs"
"""The check of what it says."""


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


FASTER = 0.95
"""Of the time of the backend that comes first anyway: what is hardly faster does not change the order."""
ADVICE = "report it with the text of `lowvram selftest --report FILE`; another driver, torch or triton may mend it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchedOff:
    operation: str
    backend: str
    reason: str
    instead: str
    advice: str = ADVICE

    def __str__(self) -> str:
        return f"{self.operation}: {self.backend} is switched off ({self.reason}); {self.instead} runs instead"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preferred:
    operation: str
    backend: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """``stuck`` are failures that no other backend makes good; ``replays``: layers came out the same as CUDA graphs."""

    off: tuple[SwitchedOff, ...]
    preferred: tuple[Preferred, ...]
    stuck: tuple[Result, ...]
    replays: bool = False

    def apply(self, device: torch.device) -> None:
        """Let this process's runs on the device go by it. What is switched off is said."""
        for one in self.off:
            # The reason stands in the run's report, so that what to do belongs to it.
            switch_off(one.operation, one.backend, device, f"{one.reason}; {one.advice}")
            log.warning("%s: %s; %s", device, one, one.advice)
        for fast in self.preferred:
            prefer(fast.operation, fast.backend, device, fast.reason)
        if self.replays:
            trust(device)
        for result in self.stuck:
            log.warning("%s: %s failed: %s", device, result.subject.name, result.message)


def judge(results: Sequence[Result]) -> Verdict:
    """One failed check is enough to lose a backend for its operation; no other operation is touched."""
    off: list[SwitchedOff] = []
    preferred: list[Preferred] = []
    stuck = [result for result in results if result.status == "failed" and not result.subject.operation]
    for operation, order in OPERATIONS.items():
        every = [result for result in results if result.subject.operation == operation]
        racing = RIVALS.get(operation, ())
        own = [result for result in every if result.subject.backend not in racing]
        failed = {result.subject.backend: result for result in reversed(own) if result.status == "failed"}
        good = [backend for backend in order if backend not in failed and _passed(own, backend)]
        for backend, result in failed.items():
            if backend == order[-1] or not good:
                # The reference cannot be switched off, and where nothing passed nothing is gone around.
                stuck.append(result)
                continue
            reason = f"{result.subject.size} shapes: {result.message}"
            off.append(SwitchedOff(operation=operation, backend=backend, reason=reason, instead=good[0]))
        wrong = {result.subject.backend for result in every if result.status != "passed"}
        # A rival that is not right at every size is no backend at all: nothing is lost, and nothing is to be said.
        right = [name for name in racing if name not in wrong and _passed(every, name)]
        if (fast := _fastest(operation, every, [*good, *right])) is not None:
            preferred.append(fast)
    replays = any(result.subject.name == REPLAYS and result.status == "passed" for result in results)
    return Verdict(off=tuple(off), preferred=tuple(preferred), stuck=tuple(stuck), replays=replays)


def _passed(results: Sequence[Result], backend: str) -> bool:
    return any(result.status == "passed" for result in results if result.subject.backend == backend)


def _fastest(operation: str, results: Sequence[Result], good: Sequence[str]) -> Preferred | None:
    """The fastest of those that are right, at the sizes of the 14B; None where the order stands as it is."""
    seconds = {
        result.subject.backend: result.seconds
        for result in results
        if result.subject.size == "14B" and result.seconds is not None and result.subject.backend in good
    }
    if not good or good[0] not in seconds:
        return None
    best = min(seconds, key=lambda backend: seconds[backend])
    if seconds[best] >= FASTER * seconds[good[0]]:
        return None
    reason = f"{seconds[best] * 1000:.3g} ms at 14B shapes, {good[0]} {seconds[good[0]] * 1000:.3g} ms"
    return Preferred(operation=operation, backend=best, reason=reason)
