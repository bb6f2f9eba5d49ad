"""A batch: all jobs looked at, then those made that can be and are not yet, one after the other, with one pipeline."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lowvram.batch.jobs import KEY, Job, There, look, record_of
from lowvram.batch.results import Result, Results
from lowvram.batch.segmented import in_segments, joined
from lowvram.infer import infer
from lowvram.outputs import Outputs
from lowvram.pipeline import AvatarPipeline
from lowvram.request import read_inputs
from lowvram_kernels.errors import LowvramError
from lowvram_models.constants import FPS

log = logging.getLogger("lowvram.plan")
_ADVICE = "; give another out or name, or --overwrite to make it again"


class Batch:
    """Jobs and what becomes of them.

    Args:
        folder: where results are kept, which is there.
        beside: what videos depend on beside their own settings: the model and how it computes.
        cut: videos that were being made when an earlier batch here ended: what lies there is its own.
        overwrite: what is there and is not the job's own video may go.
        quiet: no bars.
        segment_minutes: of a video so long a state is kept, from which it goes on when it was cut; None for none.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        folder: Path,
        *,
        beside: dict[str, Any],
        cut: set[str],
        overwrite: bool = False,
        quiet: bool = False,
        segment_minutes: float | None = None,
    ) -> None:
        self._beside, self._cut, self._overwrite, self._quiet = beside, cut, overwrite, quiet
        self._segment_minutes = segment_minutes
        self._jobs = list(jobs)
        self.results = Results(folder=folder, jobs=[Result(place=job.place, name=job.name) for job in jobs])

    def look(self) -> None:
        """Say of every job whether it can be made, and whether it is; nothing is loaded or written."""
        for job, result in zip(self._jobs, self.results.jobs, strict=True):
            if job.video is not None:
                result.video, result.report = str(job.video.absolute()), str(job.report.absolute())
            try:
                self._look(job, result)
            except Exception as error:  # whatever one file does to a library, the others are made
                result.state, result.reason = "refused", _words(error)
                log.debug("job %d", job.place, exc_info=True)
            if result.reason:
                log.warning("job %d, %s: %s: %s", job.place, job.name, result.state, result.reason)

    def _look(self, job: Job, result: Result) -> None:
        if job.wrong or job.request is None:
            result.state, result.reason = "refused", job.wrong
            return
        there = look(job, record_of(job, self._beside))
        if there.state == "done":
            _fill(result, there.facts)
            result.state, result.seconds = "there", None
        elif there.state == "nothing" or self._may_replace(job, there):
            with _unsaid():  # it is said when it is made
                read_inputs(job.request)
        else:
            result.state, result.reason = "changed", there.words + _ADVICE

    def _may_replace(self, job: Job, there: There) -> bool:
        assert job.video is not None
        ours = there.state == "foreign" and str(job.video.absolute()) in self._cut and not job.report.exists()
        return ours or self._overwrite

    def make(self, open_pipeline: Callable[[], AvatarPipeline]) -> None:
        """Make all that waits; results are written after each, and whatever ends it.

        Raises:
            KeyboardInterrupt, RuntimeError: interrupted, or a GPU that failed; what is made stays.
            LowvramError: no pipeline, or results that cannot be written.
        """
        waiting = [pair for pair in zip(self._jobs, self.results.jobs, strict=True) if pair[1].state == "waiting"]
        self.results.save()
        if not waiting:
            return
        pipeline = open_pipeline()
        for count, (job, result) in enumerate(waiting, 1):
            log.info("job %d, %s: %d of %d to make", job.place, job.name, count, len(waiting))
            result.state = "under way"
            self.results.save()
            try:
                self._make(pipeline, job, result)
            except BaseException as error:
                result.state, result.reason = _ended(error)
                if not isinstance(error, Exception) or isinstance(error, torch.AcceleratorError):
                    raise
                log.error(
                    "job %d, %s: %s", job.place, job.name, result.reason, exc_info=not isinstance(error, LowvramError)
                )
            finally:
                self.results.save()

    def _make(self, pipeline: AvatarPipeline, job: Job, result: Result) -> None:
        assert job.request is not None
        assert job.video is not None
        wanted, begin = record_of(job, self._beside), time.perf_counter()
        there = look(job, wanted)
        replaced = self._may_replace(job, there) or there.state == "nothing"
        outputs = Outputs(video=job.video, report=job.report, overwrite=replaced)
        job.video.parent.mkdir(parents=True, exist_ok=True)
        if self._segment_minutes is not None:
            outputs = in_segments(pipeline, job.request, outputs, self._segment_minutes, anew=self._overwrite)
        report = infer(pipeline, job.request, outputs, quiet=self._quiet, noted={KEY: wanted})
        if self._segment_minutes is not None:
            report = joined(outputs, report)
        _fill(result, report)
        result.state, result.seconds = "made", time.perf_counter() - begin


def _fill(result: Result, report: dict[str, Any]) -> None:
    result.frames, result.frames_per_second = report.get("frames_written"), report.get("frames_per_second")
    result.length_s = None if result.frames is None else result.frames / FPS


def _ended(error: BaseException) -> tuple[Any, str]:
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "cut", "interrupted; run again, it is made then"
    return "failed", _words(error)


def _words(error: BaseException) -> str:
    """In one line; with its kind where nobody foresaw it."""
    line = " ".join(str(error).split())
    return line if isinstance(error, LowvramError) else f"{type(error).__name__}: {line}"


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """Warnings of what is read twice are said once."""
    logger = logging.getLogger("lowvram")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
