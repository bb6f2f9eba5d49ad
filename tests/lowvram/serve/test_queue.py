"""One job after the other, whatever becomes of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowvram.serve.errors import Refused
from lowvram.serve.jobs import BROKEN, CANCELLED, DONE, FAILED, QUEUED, RUNNING
from lowvram.serve.limits import Limits
from lowvram.serve.store import Store
from lowvram_kernels.errors import ConfigError, InputError, OutOfMemoryError
from tests.lowvram.serve.fakes import PARTS, FakeMaker, add, running, until


def test_jobs_are_made_in_their_order(tmp_path: Path):
    maker = FakeMaker(free=True)
    with running(tmp_path, maker) as queue:
        jobs = [add(queue) for _ in range(4)]
        until(lambda: queue.store.job(jobs[-1].id).state == DONE)
        assert maker.made == [job.id for job in jobs]
        done = queue.store.job(jobs[0].id)
        assert done.started
        assert done.ended
        assert (done.progress.share, done.reason) == (1.0, "")
        assert (video := queue.store.place(done.id).watchable)
        assert video.read_bytes() == bytes(range(1, PARTS + 1))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (InputError("portrait {folder}/image is a PDF"), "image is a PDF"),
        (ConfigError("--wave is 9"), "--wave is 9"),
        (OutOfMemoryError("3 GiB needed\n 2 there"), "3 GiB needed 2 there"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory ran out: CUDA out of memory; ask for a smaller size"),
        (RuntimeError("a shape"), "RuntimeError: a shape"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_fails_leaves_a_reason_and_the_next_is_made(tmp_path: Path, error: Exception, reason: str):
    maker = FakeMaker(fail=error, free=True)
    with running(tmp_path, maker) as queue:
        failing = add(queue)
        if isinstance(error, InputError):
            maker.fail = InputError(str(error).format(folder=queue.store.place(failing.id).folder))
        until(lambda: queue.store.job(failing.id).state == FAILED)
        maker.fail = None
        next_one = add(queue)
        until(lambda: queue.store.job(next_one.id).state == DONE)
        assert queue.store.job(failing.id).reason.startswith(reason) or isinstance(error, InputError)
        assert str(tmp_path) not in queue.store.job(failing.id).reason
        assert not queue.stuck


def test_a_gpu_that_failed_makes_nothing_more(tmp_path: Path):
    error = torch.AcceleratorError("CUDA error: an illegal memory access")
    with running(tmp_path, FakeMaker(fail=error, free=True)) as queue:
        failing = add(queue)
        until(lambda: queue.store.job(failing.id).state == FAILED)
        later = add(queue)
        with pytest.raises(Refused, match="start lowvram serve again") as refused, queue.reserved():
            pass
        assert refused.value.status == 503
    with running(tmp_path, FakeMaker(free=True)) as queue:
        until(lambda: queue.store.job(later.id).state == DONE)


def test_cancelled_while_it_waits(tmp_path: Path):
    maker = FakeMaker()
    with running(tmp_path, maker) as queue:
        first, second, third = add(queue), add(queue), add(queue)
        until(lambda: queue.store.job(first.id).state == RUNNING)
        assert queue.cancel(second.id).state == CANCELLED
        assert queue.position(queue.store.job(third.id)) == 1
        maker.run_free()
        until(lambda: queue.store.job(third.id).state == DONE)
        assert second.id not in maker.made
        with pytest.raises(Refused, match="nothing to cancel"):
            queue.cancel(second.id)


def test_cancelled_while_it_runs_ends_behind_the_block(tmp_path: Path):
    maker = FakeMaker()
    with running(tmp_path, maker) as queue:
        job = add(queue)
        maker.go_on()
        until(lambda: queue.store.job(job.id).progress.frames == 1)
        assert queue.cancel(job.id).state == RUNNING
        maker.go_on()
        until(lambda: queue.store.job(job.id).state == CANCELLED)
        assert (video := queue.store.place(job.id).watchable)
        assert video.read_bytes() == b"\1\2"
        maker.run_free()
        after = add(queue)
        until(lambda: queue.store.job(after.id).state == DONE)


def test_the_end_of_the_process_breaks_off_what_runs_and_keeps_what_waits(tmp_path: Path):
    maker = FakeMaker()
    with running(tmp_path, maker) as queue:
        first, second = add(queue), add(queue)
        maker.go_on()
        until(lambda: queue.store.job(first.id).progress.frames == 1)
    with Store(tmp_path) as store:
        assert [job.state for job in store.jobs()] == [BROKEN, QUEUED]
    with running(tmp_path, FakeMaker(free=True)) as queue:
        until(lambda: queue.store.job(second.id).state == DONE)
        assert queue.store.job(first.id).state == BROKEN


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8])
def test_places_in_the_queue_are_counted_before_files_come(tmp_path: Path, most: int):
    maker = FakeMaker()
    with running(tmp_path, maker, Limits(queue=most)) as queue:
        running_one = add(queue)
        until(lambda: queue.store.job(running_one.id).state == RUNNING)
        for _ in range(most - 1):
            add(queue)
        with queue.reserved():
            with pytest.raises(Refused) as refused, queue.reserved():
                pass
            assert refused.value.status == 429
        with queue.reserved():
            add(queue)
        with pytest.raises(Refused, match="the queue is full"), queue.reserved():
            pass


@pytest.mark.parametrize(
    "changes",
    [{"queue": 0}, {"queue": 10**6}, {"upload_bytes": 0}, {"seconds": 0.0}, {"seconds": float("nan")}],
)
def test_limits_that_cannot_be(changes):
    with pytest.raises(ConfigError, match="--max-"):
        Limits(**changes)
