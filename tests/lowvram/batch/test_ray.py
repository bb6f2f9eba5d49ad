"""Batches over a Ray cluster: one that is none, and two nodes of a real one, one killed."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from click.testing import CliRunner

import lowvram.batch.cluster as cluster_module
from lowvram.cli import main
from lowvram.media.samples import synth_voice, write_wav
from lowvram_kernels.errors import ConfigError, DistributedError

SETTINGS = ("--device", "cpu", "--size", "128*128", "--infer-frames", "12", "--sample-steps", "1")
# Half a minute on two idle cores: what waits longer than this hangs.
LIMIT_S = 300


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--workers", "2"), 2, "with --ray"),
        (("--ray", "auto", "--workers", "0"), 2, "1 or more"),
        (("--ray", "local", "--device", "cuda:1"), 2, "--device is cuda:1"),
        (("--ray", "nowhere"), 2, "expected HOST:PORT"),
        (("--ray", "host:0"), 2, "expected HOST:PORT"),
        (("--ray", "ray://host:10001"), 2, "expected HOST:PORT"),
        (("--ray", "CLOSED"), 1, "no cluster answers there"),
        (("--ray", "gone.invalid:6379"), 1, "no cluster answers there"),
    ],
)
def test_no_cluster_is_said_at_once(tiny, tmp_path, more, code, words):
    pytest.importorskip("ray", reason="Ray is not installed: the extra ray brings it")
    with socket.socket() as free:  # bound, and nobody listens
        free.bind(("127.0.0.1", 0))
        more = [each.replace("CLOSED", f"127.0.0.1:{free.getsockname()[1]}") for each in more]
        job = {"image": str(tiny.portrait), "audio": str(tiny.voice), "prompt": "A person speaks"}
        (tmp_path / "jobs.json").write_text(json.dumps([job]))
        arguments = ["batch", tmp_path / "jobs.json", "--model", tiny.artifact("int8"), "--out-dir", tmp_path / "out"]
        begin = time.monotonic()
        done = CliRunner().invoke(main, [str(each) for each in (*arguments, *SETTINGS, *more)])
    assert time.monotonic() - begin < 20
    assert (done.exit_code, words in " ".join(done.stderr.split())) == (code, True), done.output


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH\r\n", b"\0", None])
def test_something_else_that_listens_is_no_cluster(monkeypatch, answer):
    """None is silent, and b"" hangs up."""
    pytest.importorskip("ray", reason="Ray is not installed: the extra ray brings it")
    monkeypatch.setattr(cluster_module, "_CONNECT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                if answer is None:
                    connection.recv(1024)  # until the other side goes
                else:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(DistributedError, match="no cluster answers there"), cluster_module.connected(address):
            pass
        thread.join(5)
        assert not thread.is_alive()


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"install lowvram\[ray\]"), cluster_module.connected("local"):
        pass


@pytest.mark.slow
def test_two_nodes_and_one_is_killed(tiny, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: the extra ray brings it")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    names = [f"j{number}" for number in range(6)]
    write_wav(tmp_path / "voice.wav", synth_voice(2.0), 16000)
    job = {"image": str(tiny.portrait), "audio": "voice.wav", "prompt": "A person speaks"}
    (tmp_path / "jobs.json").write_text(json.dumps({name: job | {"seed": n} for n, name in enumerate(names)}))
    node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        other = cluster.add_node(**{name: node[name] for name in node if name != "include_dashboard"})
        out, said = tmp_path / "out", tmp_path / "said.txt"
        arguments = [
            "-v",
            "batch",
            tmp_path / "jobs.json",
            "--model",
            tiny.artifact("int8"),
            "--out-dir",
            out,
            "--json",
        ]
        command = [sys.executable, "-m", "lowvram", *arguments, *SETTINGS, "--ray", cluster.address]
        with said.open("w") as log, (tmp_path / "json.txt").open("w") as stdout:
            run = subprocess.Popen([str(each) for each in command], stdout=stdout, stderr=log, env=wide(os.environ))
            try:
                begun = f"({other.node_id[:8]}), "
                wait_for(lambda: begun in said.read_text(), run)
                kill_node(cluster, other)
                assert run.wait(timeout=LIMIT_S) == 0, said.read_text()
            finally:
                run.kill()
                run.wait()
    finally:
        cluster.shutdown()
    text = said.read_text()
    facts = json.loads((tmp_path / "json.txt").read_text())
    assert [each["name"] for each in facts["jobs"]] == names
    assert facts["counts"] == {"made": 6}
    assert text.count("given back") == 1  # and none but that one was given out twice
    assert sum(text.count(f"{name}: on ") for name in names) == 7
    assert "its worker died" in text
    assert re.search(r"\(\w{8}\): write_video", text)  # of a worker, with its node
    assert sorted(each.name for each in out.glob("*.mp4")) == [f"{name}.mp4" for name in names]


def wide(environment) -> dict[str, str]:
    """Lines that are not folded."""
    return {**environment, "COLUMNS": "1000"}


def wait_for(seen, run: subprocess.Popen) -> None:
    end = time.monotonic() + LIMIT_S
    while not seen():
        assert run.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


def kill_node(cluster, node) -> None:
    """All of its processes at once, as where its power fails."""
    (raylet,) = (process.process.pid for process in node.all_processes["raylet"])
    for process in psutil.Process(raylet).children(recursive=True):
        process.kill()
    cluster.remove_node(node, allow_graceful=False)
