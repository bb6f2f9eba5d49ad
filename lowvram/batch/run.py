"""A batch: all jobs looked at, then those made that can be and are not yet, one after the other, with one pipeline."""

from __future__ import annotations

import contextlib
import dataclasses
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maker:
    """How jobs are made, wherever that is: it can be sent to another process. Fields as ``Batch`` takes them."""

    beside: dict[str, Any]
    cut: frozenset[str]
    overwrite: bool
    quiet: bool
    segment_minutes: float | None

    def may_replace(self, job: Job, there: There) -> bool:
        """What lies where its video is to be, and is not the job's own."""
        assert job.video is not None
        ours = there.state == "foreign" and str(job.video.absolute()) in self.cut and not job.report.exists()
        return ours or self.overwrite

    def make(self, pipeline: AvatarPipeline, job: Job) -> dict[str, Any]:
        """Returns the report.

        Raises:
            LowvramError: the job cannot be made.
        """
        assert job.request is not None
        assert job.video is not None
        wanted = record_of(job, self.beside)
        there = look(job, wanted)
        replaced = self.may_replace(job, there) or there.state == "nothing"
        outputs = Outputs(video=job.video, report=job.report, overwrite=replaced)
        job.video.parent.mkdir(parents=True, exist_ok=True)
        if self.segment_minutes is not None:
            outputs = in_segments(pipeline, job.request, outputs, self.segment_minutes, anew=self.overwrite)
        report = infer(pipeline, job.request, outputs, quiet=self.quiet, noted={KEY: wanted})
        return report if self.segment_minutes is None else joined(outputs, report)


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
        how: dict[str, Any] = {"overwrite": overwrite, "quiet": quiet, "segment_minutes": segment_minutes}
        self.maker = Maker(beside=beside, cut=frozenset(cut), **how)
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
                result.state, result.reason = "refused", words_of(error)
                log.debug("job %d", job.place, exc_info=True)
            if result.reason:
                log.warning("job %d, %s: %s: %s", job.place, job.name, result.state, result.reason)

    def _look(self, job: Job, result: Result) -> None:
        if job.wrong or job.request is None:
            result.state, result.reason = "refused", job.wrong
            return
        there = look(job, record_of(job, self.maker.beside))
        if there.state == "done":
            fill(result, there.facts)
            result.state, result.seconds = "there", None
        elif there.state == "nothing" or self.maker.may_replace(job, there):
            with _unsaid():  # it is said when it is made
                read_inputs(job.request)
        else:
            result.state, result.reason = "changed", there.words + _ADVICE

    @property
    def waiting(self) -> list[tuple[Job, Result]]:
        """Jobs that are to be made, with what becomes of them."""
        return [pair for pair in zip(self._jobs, self.results.jobs, strict=True) if pair[1].state == "waiting"]

    def make(self, open_pipeline: Callable[[], AvatarPipeline]) -> None:
        """Make all that waits; results are written after each, and whatever ends it.

        Raises:
            KeyboardInterrupt, RuntimeError: interrupted, or a GPU that failed; what is made stays.
            LowvramError: no pipeline, or results that cannot be written.
        """
        waiting = self.waiting
        self.results.save()
        if not waiting:
            return
        pipeline = open_pipeline()
        for count, (job, result) in enumerate(waiting, 1):
            log.info("job %d, %s: %d of %d to make", job.place, job.name, count, len(waiting))
            result.state = "under way"
            self.results.save()
            try:
                begin = time.perf_counter()
                fill(result, self.maker.make(pipeline, job))
                result.state, result.seconds = "made", time.perf_counter() - begin
            except BaseException as error:
                result.state, result.reason = ended(error)
                if not isinstance(error, Exception) or isinstance(error, torch.AcceleratorError):
                    raise
                log.error(
                    "job %d, %s: %s", job.place, job.name, result.reason, exc_info=not isinstance(error, LowvramError)
                )
            finally:
                self.results.save()


def fill(result: Result, report: dict[str, Any]) -> None:
    result.frames, result.frames_per_second = report.get("frames_written"), report.get("frames_per_second")
    result.length_s = None if result.frames is None else result.frames / FPS


def made_already(job: Job, maker: Maker) -> dict[str, Any] | None:
    """The report of a job whose video is there, made as ``maker`` would; None where it is not."""
    there = look(job, record_of(job, maker.beside))
    return there.facts if there.state == "done" else None


def ended(error: BaseException) -> tuple[Any, str]:
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "cut", "interrupted; run again, it is made then"
    return "failed", words_of(error)


def words_of(error: BaseException) -> str:
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
