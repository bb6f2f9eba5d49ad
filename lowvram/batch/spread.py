"""A batch over several workers: who gets which job, and what becomes of it when a worker, or its node, dies.

Where workers run, and how they are reached, is a pool's matter. A job is counted here, once, whatever happens there.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter, deque
from typing import Any, Literal, Protocol

from lowvram.batch.jobs import Job
from lowvram.batch.results import Result
from lowvram.batch.run import Batch, ended, fill, made_already, words_of
from lowvram_kernels.errors import DistributedError

log = logging.getLogger("lowvram.plan")
_MOST_TRIES = 3
_TURN_S = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """What came from a place: its worker is ``ready``, has ``made`` a job or ``failed`` to; ``lacks`` the job's files,
    is ``unfit`` for any job there, or ``died``. ``words`` say more, ``report`` is that of what was made."""

    place: str
    kind: Literal["ready", "made", "failed", "lacks", "unfit", "died"]
    words: str = ""
    report: dict[str, Any] = dataclasses.field(default_factory=dict)


class Pool(Protocol):
    """Places for workers, each of which makes one job at a time."""

    def places(self) -> dict[str, str]:
        """Where a worker may be now, and the name of its node."""

    def start(self, place: str) -> None:
        """A worker there, anew where one has died; ``ready``, ``unfit`` or ``died`` follows."""

    def give(self, place: str, job: Job, *, again: bool) -> None:
        """Let the worker there make a job; ``again``: another may have begun it, and what it left may go."""

    def wait(self, seconds: float) -> list[Event]:
        """What has come; nothing after so many seconds."""


class Spread:
    """Jobs of one batch on the workers of one pool."""

    def __init__(self, batch: Batch, pool: Pool) -> None:
        self._batch, self._pool = batch, pool
        self._waiting = deque(batch.waiting)
        self._nodes: dict[str, str] = {}
        self._idle: list[str] = []
        self._starting: set[str] = set()
        self._busy: dict[str, tuple[Job, Result, float]] = {}
        self._deaths: Counter[str] = Counter()
        self._tries: Counter[int] = Counter()
        self._lacking: dict[int, dict[str, str]] = {}
        self._given_up: dict[str, str] = {}
        self._was_ready = False

    def make(self) -> None:
        """Make all that waits; results are written after each, and whatever ends it.

        Raises:
            KeyboardInterrupt: what is made stays.
            DistributedError: there is no worker that could make any job.
            OutputError: results cannot be written.
        """
        self._batch.results.save()
        try:
            while self._waiting or self._busy:
                self._start()
                self._give()
                if not self._busy and not self._starting:
                    self._nobody()
                    break
                for event in self._pool.wait(_TURN_S):
                    self._take(event)
        except BaseException as error:
            for _, result, _ in self._busy.values():
                result.state, result.reason = ended(error)
            raise
        finally:
            self._batch.results.save()

    def _start(self) -> None:
        """As many workers as there are jobs for, where they are of use."""
        places = self._pool.places()
        self._idle = [place for place in self._idle if place in places]
        coming = len(self._starting) + sum(self._next(self._nodes[place]) is not None for place in self._idle)
        for place, node in places.items():
            there = place in self._idle or place in self._starting or place in self._busy
            if there or place in self._given_up or coming >= len(self._waiting) or self._next(node) is None:
                continue
            self._nodes[place] = node
            self._starting.add(place)
            self._pool.start(place)
            coming += 1

    def _next(self, node: str) -> int | None:
        """Which of those that wait a worker there takes: the first whose files are not missing there."""
        lacking = (self._lacking.get(job.place, {}) for job, _ in self._waiting)
        return next((index for index, nodes in enumerate(lacking) if node not in nodes), None)

    def _give(self) -> None:
        for place in list(self._idle):
            if (index := self._next(self._nodes[place])) is None:
                continue
            job, result = self._waiting[index]
            del self._waiting[index]
            self._idle.remove(place)
            self._busy[place] = (job, result, time.perf_counter())
            log.info("job %d, %s: on %s, %d wait", job.place, job.name, self._nodes[place], len(self._waiting))
            result.state = "under way"
            self._batch.results.save()
            self._pool.give(place, job, again=self._tries[job.place] > 0)
            self._tries[job.place] += 1

    def _take(self, event: Event) -> None:
        place, node = event.place, self._nodes[event.place]
        starting = place in self._starting
        self._starting.discard(place)
        given = self._busy.pop(place, None)
        if event.kind == "unfit":
            self._give_up(place, event.words)
        elif event.kind == "died":
            self._deaths[place] += 1
            log.warning("%s: its worker died (%s)", node, event.words)
            if self._deaths[place] >= _MOST_TRIES:
                self._give_up(place, f"its worker died {_MOST_TRIES} times, at last: {event.words}")
        else:
            self._idle.append(place)
            self._was_ready = True
            if starting:
                log.info("%s: a worker is ready", node)
        if given is not None:
            self._settle(event, *given)
            self._batch.results.save()

    def _give_up(self, place: str, words: str) -> None:
        self._given_up[place] = f"{self._nodes[place]}: {words}"
        log.warning("%s makes nothing: %s", self._nodes[place], words)

    def _settle(self, event: Event, job: Job, result: Result, begin: float) -> None:
        node = self._nodes[event.place]
        if event.kind == "failed":
            self._fail(job, result, event.words)
        elif event.kind == "lacks":
            self._lacking.setdefault(job.place, {})[node] = event.words
            self._tries[job.place] -= 1
            self._back(job, result)
        elif (report := self._seen(job)) is not None:
            fill(result, report)
            result.state, result.seconds = "made", time.perf_counter() - begin
        elif event.kind == "made":
            said = f"{node} made it, and {result.video} is not here as its report says"
            self._fail(job, result, f"{said}; let all nodes see the same folder under that path")
        elif self._tries[job.place] >= _MOST_TRIES:
            self._fail(job, result, f"{_MOST_TRIES} workers died while they made it, the last on {node}: {event.words}")
        else:
            log.warning("job %d, %s: given back, %s did not finish it", job.place, job.name, node)
            self._back(job, result)

    def _seen(self, job: Job) -> dict[str, Any] | None:
        try:
            return made_already(job, self._batch.maker)
        except Exception as error:  # its files have gone: whoever makes it says so
            log.debug("job %d: %s", job.place, words_of(error))
            return None

    def _back(self, job: Job, result: Result) -> None:
        result.state = "waiting"
        self._waiting.appendleft((job, result))

    def _fail(self, job: Job, result: Result, words: str) -> None:
        result.state, result.reason = "failed", words
        log.error("job %d, %s: %s", job.place, job.name, words)

    def _nobody(self) -> None:
        """No worker is there, and none comes, for what waits still."""
        said = "; ".join(self._given_up.values()) or "no node is alive"
        if not self._was_ready:
            raise DistributedError(f"no worker could start: {said}")
        for job, result in self._waiting:
            lacking = self._lacking.get(job.place, {})
            words = "; ".join(f"{node} lacks {what}" for node, what in lacking.items())
            advice = "put its files where all nodes see them"
            self._fail(job, result, f"{words}; {advice}" if words else f"no worker is left: {said}")
        self._waiting.clear()
