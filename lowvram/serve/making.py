"""Making of one job's video: a run of ``infer`` that is watched, and can be stopped behind any block."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import Protocol

import psutil

from lowvram.infer import Watching, infer
from lowvram.pipeline import AvatarPipeline
from lowvram.recorder import Recorder
from lowvram.serve.jobs import Job, Progress
from lowvram.serve.settings import Settings
from lowvram.serve.store import Place

_PACE_BLOCKS = 8


class Watch(Protocol):
    """Who is told how far a job is; raises ``Stopped`` where it is to end."""

    def __call__(self, progress: Progress) -> None: ...


class Maker(Protocol):
    """Makes the video of a job, to the end or until ``watch`` raises."""

    def make(self, job: Job, place: Place, watch: Watch) -> None:
        """Write what ``place.outputs`` names.

        Raises:
            LowvramError, RuntimeError: it failed; what was written stays.
        """
        ...


class PipelineMaker:
    """Makes one video after the other with one pipeline."""

    def __init__(self, pipeline: AvatarPipeline):
        self.pipeline = pipeline

    def make(self, job: Job, place: Place, watch: Watch) -> None:
        pace = Pace()

        def written(recorder: Recorder) -> None:
            done = sum(block.frames for block in recorder.blocks)
            watch(pace.progress(done, recorder.total_frames, self.memory()))

        watch(Progress(memory=self.memory()))
        watching = Watching(begun=lambda rollout, blocks: watch(pace.progress(0, None, self.memory())), written=written)
        request = Settings.model_validate(job.settings).request(place)
        infer(self.pipeline, request, place.outputs, quiet=True, watching=watching)

    def memory(self) -> dict[str, int]:
        """Bytes in use now: of the process, and on a GPU of torch's allocator."""
        there = self.pipeline.runtime.engine.memory()
        device = {} if there is None else {"allocated": there.allocated, "reserved": there.reserved, "free": there.free}
        return {"rss": psutil.Process().memory_info().rss, **device}


class Pace:
    """How fast frames come, by the latest blocks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._begin = clock, clock()
        self._seen: collections.deque[tuple[float, int]] = collections.deque(maxlen=_PACE_BLOCKS)

    def progress(self, done: int, total: int | None, memory: dict[str, int]) -> Progress:
        """As of now, with ``done`` frames of ``total`` in the video."""
        now = self._clock()
        self._seen.append((now, done))
        (first, then), left = self._seen[0], None
        if total and done > then:
            left = max(0.0, (now - first) * (total - done) / (done - then))
        return Progress(frames=done, total_frames=total, seconds=now - self._begin, seconds_left=left, memory=memory)
