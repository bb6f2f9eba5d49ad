"""Heartbeat: ranks watch each other; one that fails, dies or hangs ends the run everywhere, named with its last words.

Every rank tells twice a second that it is alive and what it is doing, through a store that all of them reach. Whoever
sees that another one has failed ends itself: first by letting its own work fail, which keeps what was written, and
where that waits for something that will not come, by leaving at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import psutil

log = logging.getLogger(__name__)

BEAT_S = 0.5
SILENCE_S = 10.0
"""Without a sign of life for so long a rank counts as dead, wherever it is."""
GRACE_S = 4.0
"""What a rank's own work has to end in, once another one has failed."""
HANG_S = 18.0
"""What takes longer than this, and than ``HANG_FACTOR`` times the longest before, hangs."""
HANG_FACTOR = 5.0


class Store(Protocol):
    """Where all ranks leave words for each other: a ``torch.distributed.Store``."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """A rank as others know it. ``machine`` is the same for ranks that see each other's processes."""

    name: str
    host: str
    machine: str
    pid: int

    @classmethod
    def me(cls, name: str) -> Peer:
        return cls(name=name, host=socket.gethostname(), machine=machine_id(), pid=os.getpid())

    @property
    def words(self) -> str:
        return f"{self.name} on {self.host}"


def machine_id() -> str:
    """Host, boot and process namespace: ranks in two containers of a host do not see each other's processes."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


@dataclasses.dataclass
class _Heard:
    """The last sign of life of another rank, and when it was seen here."""

    count: int
    doing: str
    seen: float


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a rank does, since when, and how long it may take: replaced in one piece, as the heartbeat reads it.
    Between two pieces of work a rank is ``idle``."""

    what: str
    since: float
    limit: float = float("inf")
    idle: bool = False


class Heartbeat:
    """Watches the ranks ``peers`` as number ``rank`` of them.

    Args:
        store: a connection of its own: a store answers one question at a time.
        leave: ends the process at once; takes the exit code.
    """

    def __init__(self, store: Store, rank: int, peers: list[Peer], leave: Callable[[int], None] = os._exit):
        self._store, self._rank, self._peers, self._leave = store, rank, peers, leave
        self._work = _Work("starting", time.monotonic(), idle=True)
        self._longest: dict[str, float] = {}
        self._count = 0
        self._parent = os.getppid()
        now = time.monotonic()
        self._heard = {other: _Heard(0, "starting", now) for other in range(len(peers)) if other != rank}
        self._cause: str | None = None
        self._caused = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lowvram-heartbeat", daemon=True)

    def begin(self) -> None:
        self._beat()
        self._thread.start()

    @contextlib.contextmanager
    def doing(self, what: str, kind: str, *, limit_s: float | None = None) -> Iterator[None]:
        """Say what this rank does from here on. The first of a kind may take as long as it likes (kernels are compiled,
        files read) unless ``limit_s`` bounds it, later ones are measured by those before."""
        before, begin = self._work, time.monotonic()
        longest = self._longest.get(kind)
        grown = float("inf") if longest is None else max(HANG_S, HANG_FACTOR * longest)
        self._work = _Work(what, begin, limit_s or grown)
        try:
            yield
        except BaseException:
            # Its last words stay, unless it finds a way to go on.
            self._work = _Work(self._work.what, begin, idle=before.idle)
            raise
        else:
            end = time.monotonic()
            self._longest[kind] = max(longest or 0.0, end - self._work.since)
            self._work = dataclasses.replace(
                before, what=f"done with {what}" if before.idle else before.what, since=end
            )

    def waiting(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Say that this rank waits for others, which may take as long as they need."""
        return self.doing(f"waiting for {what}", "wait", limit_s=float("inf"))

    @property
    def cause(self) -> str | None:
        """Which rank ended the run, and what it said, once that is known."""
        return self._cause

    def wait_for_cause(self, seconds: float) -> str | None:
        self._caused.wait(seconds)
        return self._cause

    def failed(self, message: str) -> None:
        """Tell the others that this rank failed by itself."""
        self._end({"failed": message})

    def done(self) -> None:
        """Tell the others that this rank has nothing more to do."""
        self._end({"done": True})
        self._over.set()

    def _end(self, value: dict[str, Any]) -> None:
        with contextlib.suppress(Exception):  # a store that is gone is no news: its host has failed
            self._store.set(f"end/{self._rank}", json.dumps(value))

    def _run(self) -> None:
        while not self._over.wait(BEAT_S):
            self._own_state()
            if self._cause is None:
                self._look()
            if self._cause is not None:
                self._end_all()
                return

    def _own_state(self) -> None:
        if os.getppid() != self._parent:
            self._give_up("the process that started this rank is gone")
        work = self._work
        silent = time.monotonic() - work.since
        if silent > work.limit:
            message = f"hangs for {silent:.0f} s: {work.what}"
            self.failed(message)
            self._give_up(f"{self._peers[self._rank].words} {message}")

    def _look(self) -> None:
        try:
            self._beat()
            for other, heard in self._heard.items():
                if found := self._state(other, heard):
                    self._found(f"{self._peers[other].words} {found}")
                    return
        except Exception as error:
            first = self._peers[0].words
            self._found(
                f"the store that ranks meet at does not answer ({_line(error)}); {first} or its launcher is gone"
            )

    def _beat(self) -> None:
        self._count += 1
        self._store.set(f"beat/{self._rank}", json.dumps([self._count, self._work.what]))

    def _state(self, other: int, heard: _Heard) -> str | None:
        """What is wrong with a rank."""
        if self._store.check([f"end/{other}"]):
            end = json.loads(self._store.get(f"end/{other}"))
            return f"failed: {end['failed']}" if "failed" in end else None
        if self._store.check([f"beat/{other}"]):
            count, heard.doing = json.loads(self._store.get(f"beat/{other}"))
            if count != heard.count:
                heard.count, heard.seen = count, time.monotonic()
        peer = self._peers[other]
        if peer.machine == self._peers[self._rank].machine and not _lives(peer.pid):
            return f"died; last it was {heard.doing}"
        silent = time.monotonic() - heard.seen
        if silent > SILENCE_S:
            self._end_silent(peer)
            return f"has given no sign of life for {silent:.0f} s; last it was {heard.doing}"
        return None

    def _end_silent(self, peer: Peer) -> None:
        """A process that is stopped or stuck would stay behind, with its memory of the card."""
        if peer.machine == self._peers[self._rank].machine:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(peer.pid, signal.SIGKILL)

    def _found(self, cause: str) -> None:
        self._cause = cause
        self._caused.set()
        with contextlib.suppress(Exception):
            self._store.set(f"found/{self._rank}", cause)

    def _end_all(self) -> None:
        if not self._over.wait(GRACE_S):
            self._give_up(self._cause or "")

    def _give_up(self, message: str) -> None:
        log.error("%s", message)
        self._leave(1)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
