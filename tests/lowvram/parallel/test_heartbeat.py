"""Who has failed, died, hung or gone silent, and what the others do: against a store, a clock and peers of our own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

from lowvram.parallel.heartbeat import HANG_S, SILENCE_S, Heartbeat, Peer, machine_id

BEAT_S = 0.01
PATIENCE_S = 20.0


class FakeStore:
    def __init__(self) -> None:
        self.words: dict[str, str] = {}
        self.gone = False

    def set(self, key: str, value: str) -> None:
        self._answer()
        self.words[key] = value

    def get(self, key: str) -> bytes:
        self._answer()
        return self.words[key].encode()

    def check(self, keys: list[str]) -> bool:
        self._answer()
        return all(key in self.words for key in keys)

    def _answer(self) -> None:
        if self.gone:
            raise RuntimeError("Broken\npipe")

    def beat(self, rank: int, count: int, doing: str) -> None:
        self.set(f"beat/{rank}", json.dumps([count, doing]))


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Left:
    """Takes the exit code of a rank that leaves at once."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self._once = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self._once.set()

    def wait(self) -> list[int]:
        assert self._once.wait(PATIENCE_S)
        return self.codes[:1]


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("lowvram.parallel.heartbeat.time", found)
    monkeypatch.setattr("lowvram.parallel.heartbeat.BEAT_S", BEAT_S)
    monkeypatch.setattr("lowvram.parallel.heartbeat.GRACE_S", 2 * BEAT_S)
    return found


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def left() -> Left:
    return Left()


@pytest.fixture
def begin(clock, store, left) -> Iterator[Callable[..., Heartbeat]]:
    """The heartbeat of rank 0 over itself and another rank, far away unless said otherwise."""
    begun: list[Heartbeat] = []

    def start(other: Peer | None = None) -> Heartbeat:
        far = Peer(name="rank 1 (VAE)", host="far", machine="another", pid=1)
        me = Peer(name="rank 0 (stage 0, part 0)", host="here", machine=machine_id(), pid=os.getpid())
        found = Heartbeat(store, 0, [me, other or far], left)
        found.begin()
        begun.append(found)
        return found

    yield start
    for found in begun:
        store.gone = False
        found.done()
        found._thread.join(PATIENCE_S)
        assert not found._thread.is_alive()


@pytest.fixture
def alone(begin, store) -> Heartbeat:
    """A heartbeat whose other rank has nothing more to say."""
    store.set("end/1", json.dumps({"done": True}))
    return begin()


def neighbour(pid: int) -> Peer:
    return Peer(name="rank 1 (VAE)", host="here", machine=machine_id(), pid=pid)


@pytest.fixture
def child() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def beats(store: FakeStore, count: int = 3) -> None:
    """Until the heartbeat has looked so many times."""
    first = json.loads(store.words["beat/0"])[0]
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / BEAT_S)):
        if json.loads(store.words["beat/0"])[0] >= first + count:
            return
        pause.wait(BEAT_S)
    raise AssertionError("the heartbeat looks no more")


def test_a_rank_that_fails_is_named_with_its_words(begin, store, left):
    heartbeat = begin()
    store.set("end/1", json.dumps({"failed": "OutputError: the disk is full"}))
    assert heartbeat.wait_for_cause(PATIENCE_S) == "rank 1 (VAE) on far failed: OutputError: the disk is full"
    assert heartbeat.cause == store.words["found/0"]
    # Its own work does not end within the grace.
    assert left.wait() == [1]


def test_work_that_ends_by_itself_is_left_alone(begin, store, left, monkeypatch):
    monkeypatch.setattr("lowvram.parallel.heartbeat.GRACE_S", PATIENCE_S)
    heartbeat = begin()
    store.set("end/1", json.dumps({"failed": "ended"}))
    assert heartbeat.wait_for_cause(PATIENCE_S)
    heartbeat.done()
    heartbeat._thread.join(PATIENCE_S)
    assert left.codes == []


def test_a_rank_that_is_done_is_not_missed(begin, store, clock, child):
    heartbeat = begin(neighbour(child.pid))
    store.set("end/1", json.dumps({"done": True}))
    child.kill()
    child.wait()
    clock.now += 10 * SILENCE_S
    beats(store)
    assert heartbeat.cause is None


@pytest.mark.parametrize("reaped", [False, True])
def test_a_process_that_died(begin, store, child, reaped):
    heartbeat = begin(neighbour(child.pid))
    store.beat(1, 1, "denoising block 3")
    beats(store)
    assert heartbeat.cause is None
    child.kill()
    if reaped:
        child.wait()
    assert heartbeat.wait_for_cause(PATIENCE_S) == "rank 1 (VAE) on here died; last it was denoising block 3"


def test_silence_of_another_machine(begin, store, clock):
    heartbeat = begin()
    for count in range(1, 4):
        clock.now += SILENCE_S - 1
        store.beat(1, count, "decoding block 2")
        beats(store)
        assert heartbeat.cause is None
    clock.now += SILENCE_S + 1
    words = "rank 1 (VAE) on far has given no sign of life for 11 s; last it was decoding block 2"
    assert heartbeat.wait_for_cause(PATIENCE_S) == words


def test_a_stopped_process_does_not_stay_behind(begin, store, clock, child):
    heartbeat = begin(neighbour(child.pid))
    store.beat(1, 1, "denoising block 0")
    beats(store)
    os.kill(child.pid, signal.SIGSTOP)
    clock.now += SILENCE_S + 1
    assert "no sign of life" in (heartbeat.wait_for_cause(PATIENCE_S) or "")
    assert child.wait(PATIENCE_S) == -signal.SIGKILL


def test_a_store_that_is_gone(begin, store, left):
    heartbeat = begin()
    store.gone = True
    cause = heartbeat.wait_for_cause(PATIENCE_S)
    assert cause == (
        "the store that ranks meet at does not answer (Broken pipe); rank 0 (stage 0, part 0) on here or its "
        "launcher is gone"
    )
    assert left.wait() == [1]


def test_a_starter_that_is_gone(begin, left, monkeypatch, caplog):
    begin()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert left.wait() == [1]
    assert "the process that started this rank is gone" in caplog.text


def test_a_rank_that_hangs_says_so_and_leaves(alone, store, left, clock, caplog):
    with alone.doing("trying the exchange", "handshake", limit_s=25):
        clock.now += 24
        beats(store)
        assert left.codes == []
        clock.now += 2
        assert left.wait() == [1]
    said = json.loads(store.words["end/0"])
    assert said == {"failed": "hangs for 26 s: trying the exchange"}
    assert "rank 0 (stage 0, part 0) on here hangs for 26 s" in caplog.text


def test_the_first_of_a_kind_takes_as_long_as_it_likes_and_measures_the_next(alone, store, left, clock):
    with alone.doing("denoising block 0", "denoise"):
        clock.now += 100
        beats(store)
    with alone.doing("denoising block 1", "denoise"):
        clock.now += 499  # five times the longest before
        beats(store)
        assert left.codes == []
        clock.now += 2
        assert left.wait() == [1]


def test_what_takes_no_time_may_take_some(alone, store, left, clock):
    for _ in range(2):
        with alone.doing("decoding", "decode"):
            clock.now += 0.001
    with alone.doing("decoding", "decode"):
        clock.now += HANG_S - 1
        beats(store)
    with alone.waiting("the others' conditions"):
        clock.now += 1e6
        beats(store)
    assert left.codes == []


def test_others_are_told_what_it_does(begin, store):
    def said() -> str:
        beats(store)
        return json.loads(store.words["beat/0"])[1]

    heartbeat = begin()
    assert said() == "starting"
    with heartbeat.doing("denoising block 0", "denoise"):
        assert said() == "denoising block 0"
        with heartbeat.waiting("the other ranks"):
            assert said() == "waiting for the other ranks"
        assert said() == "denoising block 0"
    assert said() == "done with denoising block 0"


def test_last_words_of_what_failed_stay(alone, store, clock, left):
    with pytest.raises(ValueError, match="bad"), alone.doing("decoding block 1", "decode", limit_s=5):
        raise ValueError("bad")
    clock.now += 60
    beats(store)
    assert json.loads(store.words["beat/0"])[1] == "decoding block 1"
    assert left.codes == []


def test_people(monkeypatch):
    me = Peer.me("rank 3 (VAE)")
    assert (me.pid, me.machine) == (os.getpid(), machine_id())
    assert me.words == f"rank 3 (VAE) on {me.host}"
    # Containers of one host do not see each other's processes.
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    assert machine_id() != me.machine
