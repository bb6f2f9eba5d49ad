"""Ranks for tests: processes that imported everything once, and then are ranks of one run after another."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import TCPStore

ADDRESS = "127.0.0.1"
# Imported before the ranks are forked, so that it costs its seconds once.
PRELOAD = ["lowvram.cli", "lowvram.infer", "lowvram.parallel.rank", "lowvram.parallel.launch", "torch.distributed"]
PRELOAD += [
    "transformers.models.umt5.modeling_umt5",
    "transformers.models.wav2vec2.modeling_wav2vec2",
    "lowvram_models.vae",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
]
LIMIT_S = 60.0

Arguments = Sequence[str]
Around = Callable[[], AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How one rank's run ended: its exit code (None: it had to be killed), what it said, and what ``around`` gave,
    whose value has to be picklable once the run is over. ``threads`` and open ``descriptors`` are what it left. Of a
    rank that left at once code and words are all there is."""

    code: int | None
    stderr: str
    seen: Any = None
    threads: int = 0
    descriptors: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    environ: dict[str, str]
    arguments: list[str]
    around: Around | None
    said: Path


class Ranks:
    """Worker processes, started when they are first needed. One that failed is not used again."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")

    def run(
        self,
        world: int,
        arguments: Arguments | Mapping[int, Arguments],
        *,
        around: Around | None = None,
        environ: Mapping[str, str] | None = None,
        limit_s: float = LIMIT_S,
    ) -> list[Ended]:
        """Run ``lowvram`` with ``arguments`` (by rank, where they differ) as ``world`` ranks; as one process that is no
        rank where ``world`` is 0. ``around`` is entered in each of them around the run."""
        count = max(world, 1)
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        store = TCPStore(ADDRESS, 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=30))
        while len(self._workers) < count:
            self._workers.append(self._fork())
        workers = self._workers[:count]
        for rank, (_, connection) in enumerate(workers):
            own = arguments[rank] if isinstance(arguments, Mapping) else arguments
            told = (_rank_environ(rank, world, store.port) if world else {}) | dict(environ or {})
            connection.send(_Job(environ=told, arguments=list(own), around=around, said=folder / str(rank)))
        ended = [self._end(*worker, folder / str(rank), limit_s) for rank, worker in enumerate(workers)]
        for worker, end in zip(workers, ended, strict=True):
            if end.code != 0:
                worker[0].kill()
                self._workers.remove(worker)
        return ended

    def succeed(self, world: int, arguments: Arguments, **options: Any) -> list[Ended]:
        """The same for a run that has to succeed."""
        ended = self.run(world, arguments, **options)
        assert [end.code for end in ended] == [0] * max(world, 1), "\n".join(end.stderr for end in ended)
        return ended

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.join(5)
            process.kill()
        self._folder.cleanup()

    def _fork(self) -> tuple[Any, Connection]:
        here, there = self._context.Pipe()
        with _one_thread():
            process = self._context.Process(target=_work, args=(there,), daemon=True)
            process.start()
        there.close()
        return process, here

    def _end(self, process: Any, connection: Connection, said: Path, limit_s: float) -> Ended:
        if wait([connection, process.sentinel], limit_s):
            with contextlib.suppress(EOFError):
                return dataclasses.replace(connection.recv(), stderr=said.read_text())
            process.join(5)
        code = process.exitcode
        process.kill()
        return Ended(code=code, stderr=said.read_text() if said.exists() else "it did not begin")


def _rank_environ(rank: int, world: int, port: int) -> dict[str, str]:
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    told |= {"MASTER_ADDR": ADDRESS, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {name: str(value) for name, value in told.items()}


@contextlib.contextmanager
def _one_thread():
    """The fork server keeps the environment that it finds when it starts."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _work(connection: Connection) -> None:
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(_run(job))


def _run(job: _Job) -> Ended:
    import threading

    from lowvram.cli import main

    with job.said.open("w") as said, _environment(job.environ), _stderr_to(said.fileno()):
        around = job.around() if job.around else contextlib.nullcontext()
        code, seen = 0, None
        try:
            with around as seen:
                main.main(job.arguments, prog_name="lowvram")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
        left = {"threads": threading.active_count(), "descriptors": len(os.listdir("/proc/self/fd"))}
    return Ended(code=code, stderr="", seen=seen, **left)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]):
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _stderr_to(file: int):
    """Of the whole process: libraries below Python write there too."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(file, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
