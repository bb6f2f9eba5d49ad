"""Launch of ranks, ``infer --gpus N``: one process a rank on this machine, and nothing left of them when it is over."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

import psutil
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError

from lowvram.parallel.rendezvous import GONE, prefix
from lowvram_kernels.errors import ConfigError, DistributedError, LowvramError

log = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
_POLL_S = 0.1
# What the others have to end by themselves in, once one rank has ended badly; then they are told to, then made to.
_BY_THEMSELVES_S, _GRACE_S = 12.0, 18.0
# A rank that is stopped for so long does not come back. Once ranks have met they see to that themselves.
_STOPPED_S = 10.0


class RanksFailed(DistributedError):
    """A rank failed. The exit code is the rank's."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def launch(ranks: int, arguments: Sequence[str], *, port: int = 0) -> None:
    """Run ``lowvram`` with ``arguments`` as ``ranks`` ranks of this machine; returns when all have succeeded.

    The ranks meet at ``port`` (0: any that is free), which this process keeps open.

    Raises:
        ConfigError: the port is taken.
        RanksFailed: a rank failed; all of them have ended.
    """
    store = _open_store(port)
    processes: list[subprocess.Popen[bytes]] = []
    with _interrupted_by(signal.SIGTERM):
        try:
            for rank in range(ranks):
                command = [sys.executable, "-m", "lowvram", *arguments]
                processes.append(subprocess.Popen(command, env=_environ(rank, ranks, store.port)))
            first = _wait(processes)
            if first is not None:
                _words(store).set(GONE, _end_of(first, [process.poll() for process in processes], store))
        except BaseException:
            for process in processes:
                process.terminate()
            raise
        finally:
            _end(processes)
    if first is not None:
        raise _failure(first, [process.returncode for process in processes], store)


def _open_store(port: int) -> TCPStore:
    try:
        return TCPStore(ADDRESS, port, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=30))
    except (DistError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"--port {port} cannot be used ({reason}); expected a free one: leave --port out") from error


def _environ(rank: int, ranks: int, port: int) -> dict[str, str]:
    told = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": ADDRESS,
        "MASTER_PORT": port,
        # As torchrun says it: the store is kept by the starter.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        # This process says what went wrong, once for all ranks: see ``lowvram.cli.fail``.
        "LOWVRAM_STARTED": "1",
    }
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    return threads | dict(os.environ) | {name: str(value) for name, value in told.items()}


def _wait(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """The rank that ended badly first, of several rather one that was killed; None where all have succeeded."""
    running: dict[int, float] = {}
    while True:
        _kill_stopped(processes, running)
        codes = [process.poll() for process in processes]
        if bad := [rank for rank, code in enumerate(codes) if code]:
            return min(bad, key=lambda rank: codes[rank] or 0)
        if all(code == 0 for code in codes):
            return None
        time.sleep(_POLL_S)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Let the ranks end by themselves, then end them."""
    begin = time.monotonic()
    for seconds, then in ((_BY_THEMSELVES_S, signal.SIGTERM), (_GRACE_S, signal.SIGKILL)):
        while any(process.poll() is None for process in processes) and time.monotonic() < begin + seconds:
            time.sleep(_POLL_S)
        for process in processes:
            if process.poll() is None:
                process.send_signal(then)
    for process in processes:
        process.wait()


def _kill_stopped(processes: list[subprocess.Popen[bytes]], running: dict[int, float]) -> None:
    """``running`` has, for each rank, when it was last seen to be no stopped process."""
    now = time.monotonic()
    for rank, process in enumerate(processes):
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
                running[rank] = now
            elif now - running.setdefault(rank, now) > _STOPPED_S:
                process.kill()


def _failure(first: int, codes: list[int], store: Store) -> LowvramError:
    """What the rank says that failed by itself; else how the one ended that was first."""
    words = _words(store)
    for rank, code in enumerate(codes):
        if code and words.check([f"end/{rank}"]):
            said = json.loads(words.get(f"end/{rank}"))
            if "failed" in said:
                return RanksFailed(f"rank {rank} of {len(codes)}: {said['failed']}", max(code, 1))
    for rank, code in enumerate(codes):
        if code and words.check([f"found/{rank}"]):
            return RanksFailed(words.get(f"found/{rank}").decode(), 1)
    # Not just any rank that was killed: after the first one, those were that did not end by themselves.
    return RanksFailed(_end_of(first, codes, store), 1)


def _end_of(rank: int, codes: Sequence[int | None], store: Store) -> str:
    code = codes[rank] or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"rank {rank} of {len(codes)} on this machine {how}; last it was {_doing(_words(store), rank)}"


def _words(store: Store) -> Store:
    return PrefixStore(prefix("0"), store)


def _doing(words: Store, rank: int) -> str:
    if not words.check([f"beat/{rank}"]):
        return "starting"
    return str(json.loads(words.get(f"beat/{rank}"))[1])


@contextlib.contextmanager
def _interrupted_by(signum: int) -> Iterator[None]:
    """Let a signal end what is under way as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signum, interrupt)
    try:
        yield
    finally:
        signal.signal(signum, before)
