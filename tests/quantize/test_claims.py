"""Claims on paths: one writer, many readers, and nothing left of them when a process is killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

import lowvram_quantize.claims as module
from lowvram_kernels.errors import InputError
from lowvram_quantize.claims import lock_file, reading, replacing, writing

HOLD = """
import sys, time
from pathlib import Path
from lowvram_quantize.claims import reading, writing
with (writing(Path(sys.argv[2]), "lowvram infer") if sys.argv[1] == "writing" else reading(Path(sys.argv[2]))):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def elsewhere():
    """Have another process hold a claim; gives the process."""
    running = []

    def hold(kind: str, path) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", HOLD, kind, str(path)], stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in running:
        process.kill()
        process.wait()


def test_the_holder_is_named(elsewhere, tmp_path):
    holder = elsewhere("writing", tmp_path / "a.mp4")
    with pytest.raises(InputError, match=f"process {holder.pid} on .*lowvram infer, since 20"):
        with writing(tmp_path / "a.mp4", "x"):
            pass
    with writing(tmp_path / "b.mp4", "x"):
        pass


def test_a_killed_holder_holds_nothing(elsewhere, tmp_path):
    holder = elsewhere("writing", tmp_path / "a.mp4")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with writing(tmp_path / "a.mp4", "x"):
        assert lock_file(tmp_path / "a.mp4").exists()
    assert list(tmp_path.iterdir()) == []


def test_never_two_at_once_when_many_come_and_go(tmp_path):
    """Locks are taken away by their holders: no one may hold a file that has gone."""
    inside, most, refused = [], [], []

    def come_and_go() -> None:
        for _ in range(200):
            try:
                with writing(tmp_path / "a", "x"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except InputError:
                refused.append(1)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) + len(refused) == 800


def test_readers_share_and_keep_a_replacement_away(elsewhere, tmp_path):
    file = tmp_path / "manifest.json"
    file.write_text("{}")
    elsewhere("reading", file)
    with reading(file):
        pass
    with pytest.raises(InputError, match="in use by a run"), replacing(file):
        pass


def test_a_replacement_keeps_readers_away(tmp_path):
    file = tmp_path / "manifest.json"
    file.write_text("{}")
    with replacing(file), pytest.raises(InputError, match="is being replaced"), reading(file):
        pass
    with reading(file):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def flock(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with writing(tmp_path / "a", "x"):
        pass
    assert "has no locks" in caplog.text
