"""``infer --gpus N``: what the starter does; its ranks here are shell commands."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import types
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from torch._C._distributed_c10d import HashStore, PrefixStore

import lowvram.parallel.launch as launching
from lowvram.cli import main
from lowvram.parallel.launch import RanksFailed, launch
from lowvram.parallel.rendezvous import GONE, prefix
from lowvram_kernels.errors import ConfigError


@pytest.fixture
def shell(monkeypatch, tmp_path):
    """Ranks run the shell command that stands for lowvram's arguments."""
    script = tmp_path / "rank.sh"
    script.write_text('#!/bin/sh\nshift 2\nexec sh -c "$1"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    for name, seconds in (("_BY_THEMSELVES_S", 0.3), ("_GRACE_S", 0.6), ("_STOPPED_S", 0.3)):
        monkeypatch.setattr(launching, name, seconds)


@pytest.fixture
def taken_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.mark.usefixtures("shell")
def test_each_rank_is_told_who_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    launch(2, [f"env > {tmp_path}/$RANK.txt"])
    told = [dict(line.split("=", 1) for line in _lines(tmp_path / f"{rank}.txt")) for rank in range(2)]
    for rank, words in enumerate(told):
        assert words["RANK"] == words["LOCAL_RANK"] == str(rank)
        assert words["WORLD_SIZE"] == words["LOCAL_WORLD_SIZE"] == "2"
        assert words["MASTER_ADDR"] == "127.0.0.1"
        assert words["OMP_NUM_THREADS"] == "3"  # said by the user
        assert words["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    assert told[0]["MASTER_PORT"] == told[1]["MASTER_PORT"]


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if "=" in line]


@pytest.mark.usefixtures("shell")
def test_threads_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    launch(2, [f"echo $OMP_NUM_THREADS > {tmp_path}/$RANK.txt"])
    assert (tmp_path / "1.txt").read_text() == "4\n"


@pytest.mark.usefixtures("shell")
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("exit $((RANK * 3))", "rank 1 of 2 on this machine ended with exit code 3; last it was starting"),
        ("[ $RANK = 0 ] || kill -9 $$", "rank 1 of 2 on this machine was killed by SIGKILL; last it was starting"),
        ("[ $RANK = 0 ] && exit 1; exec sleep 60", "rank 0 of 2 on this machine ended with exit code 1"),
        (
            "[ $RANK = 1 ] && kill -9 $$; trap '' TERM; exec sleep 60",
            "rank 1 of 2 on this machine was killed by SIGKILL",
        ),
        ("[ $RANK = 1 ] && kill -STOP $$; exec sleep 60", "rank 1 of 2 on this machine was killed by SIGKILL"),
    ],
)
def test_a_rank_that_ends_badly_ends_all(command, words):
    before, begin = psutil.Process().children(), time.monotonic()
    with pytest.raises(RanksFailed, match=words) as failed:
        launch(2, [command])
    assert failed.value.exit_code == 1
    assert time.monotonic() - begin < 5
    assert psutil.Process().children() == before


def test_ranks_that_still_wait_for_one_that_ended_are_told(shell, monkeypatch):
    """Before all have met no rank watches another one: the starter says it."""
    stores, opened = [], launching._open_store
    monkeypatch.setattr(launching, "_open_store", lambda port: stores.append(opened(port)) or stores[0])
    words = "rank 1 of 2 on this machine ended with exit code 3; last it was starting"
    with pytest.raises(RanksFailed, match=words):
        launch(2, ["exit $((RANK * 3))"])
    assert PrefixStore(prefix("0"), stores[0]).get(GONE).decode() == words


@pytest.mark.usefixtures("shell")
def test_sigterm_ends_the_ranks(tmp_path):
    before, handler = psutil.Process().children(), signal.getsignal(signal.SIGTERM)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch(2, ["exec sleep 60"])
    assert time.monotonic() - begin < 5
    assert psutil.Process().children() == before
    assert signal.getsignal(signal.SIGTERM) == handler


def failure(first: int, codes: list[int], words: dict[str, str]) -> RanksFailed:
    store = HashStore()
    for key, value in words.items():
        PrefixStore(prefix("0"), store).set(key, value)
    return launching._failure(first, codes, store)


def test_the_words_of_the_rank_that_failed_by_itself_are_told():
    ended = json.dumps({"failed": "ConfigError: ranks differ"})
    error = failure(0, [1, 2, 0], {"found/0": "rank 1 failed", "end/1": ended, "end/2": json.dumps({"done": True})})
    assert str(error) == "rank 1 of 3: ConfigError: ranks differ"
    assert error.exit_code == 2


def test_one_that_failed_and_was_killed_fails_the_run():
    ended = json.dumps({"failed": "hangs for 26 s: trying the exchange"})
    assert failure(0, [-9, 1], {"end/0": ended}).exit_code == 1


def test_else_what_another_rank_found():
    found = "rank 1 (VAE) on here died; last it was decoding block 3"
    error = failure(1, [1, -9], {"found/0": found, "end/0": json.dumps({"done": True})})
    assert (str(error), error.exit_code) == (found, 1)


def test_else_how_the_first_one_ended():
    error = failure(2, [-9, 1, -11], {"beat/2": json.dumps([3, "denoising block 1"])})
    assert str(error) == "rank 2 of 3 on this machine was killed by SIGSEGV; last it was denoising block 1"


def test_of_several_that_ended_the_one_that_was_killed_was_first():
    ranks = [types.SimpleNamespace(poll=lambda code=code: code, pid=os.getpid()) for code in (1, 0, -9, None)]
    assert launching._wait(ranks) == 2


def test_a_port_that_is_taken(taken_port):
    with pytest.raises(ConfigError, match=f"--port {taken_port} cannot be used .*; expected a free one: leave --port"):
        launch(2, [], port=taken_port)


@pytest.fixture
def refused(monkeypatch, maker, tmp_path):
    """What ``lowvram infer --gpus 2`` answers where it may start no process."""
    monkeypatch.setattr(launching.subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))

    def run(*more: str, environ: dict[str, str] | None = None, **changes: object) -> tuple[int, str]:
        arguments = maker.arguments(tmp_path / "out.mp4", *more, **changes)
        done = CliRunner().invoke(main, arguments, env=environ)
        assert not (tmp_path / "out.partial.mp4").exists()
        return done.exit_code, " ".join(done.output.split())

    return run


def test_refused_before_any_process_starts(refused, taken_port):
    code, said = refused("--gpus=2", f"--port={taken_port}")
    assert code == 2
    assert f"--port {taken_port} cannot be used" in said
    code, said = refused("--gpus=2", image="none.png")
    assert code == 2
    assert "none.png" in said
    code, said = refused("--gpus=2", "--report=no/folder/report.json")
    assert code == 2
    assert "does not exist" in said
    code, said = refused("--gpus=2", "--allow-quality-loss")
    assert code == 2
    assert "--allow-quality-loss begins a video again, which several ranks cannot" in said
    code, said = refused("--num_gpus_dit=3", "--ulysses_size=3", "--enable_vae_parallel")
    assert code == 2
    assert "needs 4 ranks, and one was started; add --gpus 4" in said


def test_more_gpus_than_are_here(refused, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, said = refused("--gpus=2", device="cuda")
    assert code == 2
    assert "--gpus is 2, but 1 GPUs are here; give --gpus 1 or --device cpu" in said


def test_a_wrong_world_size(refused):
    told = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    code, said = refused("--num_gpus_dit=3", "--enable_vae_parallel", environ=told | {"WORLD_SIZE": "5"})
    assert code == 2
    assert "5 ranks were started, but --num_gpus_dit 3 and one for the VAE (--enable_vae_parallel) are 4" in said
    code, said = refused("--gpus=4", environ=told | {"WORLD_SIZE": "5"})
    assert code == 2
    assert "--gpus is 4, but 5 ranks were started" in said
    code, said = refused(environ={"WORLD_SIZE": "5"})
    assert code == 2
    assert "and RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set; expected" in said
