"""Queue: one thread makes one job after the other; what fails leaves a reason, and the next one begins."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

from lowvram.devices import is_out_of_memory
from lowvram.serve.errors import Refused, Stopped
from lowvram.serve.jobs import BROKEN, CANCELLED, DONE, FAILED, OPEN_STATES, QUEUED, RUNNING, Job, Progress
from lowvram.serve.limits import Limits
from lowvram.serve.making import Maker
from lowvram.serve.settings import without_paths
from lowvram.serve.store import BROKEN_OFF, Place, Store
from lowvram_kernels.errors import LowvramError

log = logging.getLogger(__name__)
_CANCELLED = "cancelled"


class WorkQueue:
    """Works on what is queued in ``store`` while it is entered; jobs that were queued before are among it.

    At exit the job under way is told to end, which it does behind the block that it is at, and what is queued stays.
    """

    def __init__(self, store: Store, maker: Maker, limits: Limits):
        self.store, self.limits = store, limits
        self._maker = maker
        self._changed = threading.Condition()
        self._on_their_way = 0
        self._cancelled: set[str] = set()
        self._stopping = False
        self.stuck = ""
        """Why nothing more is made in this process; "" while all is well."""
        self._thread = threading.Thread(target=self._work, name="lowvram serve", daemon=True)

    def __enter__(self) -> WorkQueue:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Begin nothing more, and end the job under way."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    @property
    def stopping(self) -> bool:
        return self._stopping

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """A place in the queue, before the upload that it is for is read.

        Raises:
            Refused: (429) the queue is full; (503) nothing more is made.
        """
        with self._changed:
            if self.stuck or self._stopping:
                raise Refused(503, self.stuck or "lowvram serve ends; start it again")
            waiting = len(self.store.waiting())
            if waiting + self._on_their_way >= self.limits.queue:
                raise Refused(
                    429,
                    f"the queue is full: {waiting} jobs wait and {self._on_their_way} are on their way, expected fewer "
                    f"than {self.limits.queue}; try again later",
                )
            self._on_their_way += 1
        try:
            yield
        finally:
            with self._changed:
                self._on_their_way -= 1

    def add(self, place: Place, settings: dict[str, Any]) -> Job:
        """Queue what lies in ``place``, for which a place is reserved."""
        job = self.store.add(place, settings)
        with self._changed:
            self._changed.notify_all()
        return job

    def cancel(self, name: str) -> Job:
        """Cancel a job: at once where it is queued; behind the block under way where it runs, so that its state is
        "running" a while longer.

        Raises:
            Refused: (404) there is none; (409) it has ended already.
        """
        with self._changed:
            job = self.store.job(name)
            if job.state not in OPEN_STATES:
                raise Refused(409, f"job {name} is {job.state} already; there is nothing to cancel")
            if job.state == QUEUED:
                return self.store.change(name, state=CANCELLED, reason=_CANCELLED, ended=time.time())
            self._cancelled.add(name)
            return self.store.change(name, reason="is being cancelled")

    def position(self, job: Job) -> int | None:
        """How many are made before a queued one; None of another."""
        if job.state != QUEUED:
            return None
        running = sum(other.state == RUNNING and other.id != job.id for other in self.store.jobs())
        return running + sum(other.created < job.created for other in self.store.waiting())

    def _work(self) -> None:
        while (job := self._next()) is not None:
            log.info("job %s is being made", job.id)
            try:
                ended = self._made(job)
            except Exception as error:  # whatever it is, it is one job's end, and not the queue's
                log.exception("job %s", job.id)
                ended = {"state": FAILED, "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
            with self._changed:
                self._cancelled.discard(job.id)
                self.store.change(job.id, ended=time.time(), **ended)
            log.info("job %s is %s%s", job.id, ended["state"], f": {ended['reason']}" if ended["reason"] else "")

    def _next(self) -> Job | None:
        """The next job, running now; waits for one. None where nothing more is to be made."""
        with self._changed:
            while True:
                if self._stopping or self.stuck:
                    return None
                if waiting := self.store.waiting():
                    return self.store.change(waiting[0].id, state=RUNNING, started=time.time())
                self._changed.wait()

    def _made(self, job: Job) -> dict[str, str]:
        """How it ended."""
        place = self.store.place(job.id)

        def watch(progress: Progress) -> None:
            self.store.change(job.id, progress=progress)
            if job.id in self._cancelled or self._stopping:
                raise Stopped

        try:
            self._maker.make(job, place, watch)
        except Stopped:
            if job.id in self._cancelled:
                return {"state": CANCELLED, "reason": _CANCELLED}
            return {"state": BROKEN, "reason": BROKEN_OFF}
        except LowvramError as error:
            return {"state": FAILED, "reason": without_paths(" ".join(str(error).split()), place)}
        except RuntimeError as error:
            return {"state": FAILED, "reason": self._of_the_device(error)}
        return {"state": DONE, "reason": ""}

    def _of_the_device(self, error: RuntimeError) -> str:
        """Raises: RuntimeError: it is not the device's."""
        import torch

        said = " ".join(str(error).split())
        if is_out_of_memory(error):
            return f"memory ran out: {said}; ask for a smaller size, fewer frames a clip, or start with --vram-budget"
        if not isinstance(error, torch.AcceleratorError):
            raise error
        # A process whose card failed cannot use it again; what is queued is made by the next one.
        self.stuck = f"the GPU failed: {said}; start lowvram serve again, jobs that are queued will be made then"
        log.error("%s", self.stuck)
        return f"the GPU failed: {said}"
