"""Batches over several workers: deaths at every moment, all made once; and two nodes of a real cluster, one killed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import psutil
import pytest
from click.testing import CliRunner

import lowvram.batch.cluster as cluster_module
import lowvram.batch.run as run_module
from lowvram.batch.jobs import Job
from lowvram.batch.run import Batch
from lowvram.batch.spread import Event, Spread
from lowvram.batch.worker import Orders, Worker
from lowvram.cli import main
from lowvram.media.samples import draw_portrait, synth_voice, write_wav
from lowvram.media.video import VideoWriter
from lowvram.request import Request
from lowvram_kernels.errors import ConfigError, DistributedError, InputError
from lowvram_quantize.claims import writing
from lowvram_quantize.slabs import sha256_file

SETTINGS = ("--device", "cpu", "--size", "128*128", "--infer-frames", "12", "--sample-steps", "1")


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Instead of the model something that writes half a second of video, and says of what."""
    names: list[str] = []

    def infer(pipeline, request, outputs, *, quiet, noted):
        outputs.check()
        names.append(outputs.video.name)
        if request.prompt == "fail":
            raise InputError("it cannot be")
        with outputs.claimed(), VideoWriter(outputs.video, 64, 64) as writer:
            writer.write(np.zeros((12, 64, 64, 3), np.uint8))
        report = {"frames_written": 12, "fragmented": False, "frames_per_second": 2.0, **noted}
        outputs.report.write_text(json.dumps(report))
        return report

    monkeypatch.setattr(run_module, "infer", infer)
    return names


@pytest.fixture
def batch(tmp_path):
    """Makes one of so many jobs."""

    def make(count: int, prompts: dict[int, str] | None = None) -> Batch:
        draw_portrait(64, 64).save(tmp_path / "a.png")
        write_wav(tmp_path / "a.wav", synth_voice(1.0), 16000)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "manifest.json").write_text("{}")
        jobs = []
        for place in range(1, count + 1):
            prompt = (prompts or {}).get(place, "A person speaks")
            request = Request(image=tmp_path / "a.png", audio=tmp_path / "a.wav", prompt=prompt, base_seed=place)
            jobs.append(Job(place=place, name=f"j{place}", request=request, video=tmp_path / f"j{place}.mp4"))
        beside = {"artifact_sha256": sha256_file(tmp_path / "model" / "manifest.json")}
        batch = Batch(jobs, tmp_path, beside=beside, cut=set(), quiet=True)
        batch.look()
        return batch

    return make


class FakePool:
    """Workers of this process. ``deaths``: for each call at a place, in their order, the moment at which it dies:
    "open", "before" the job, with half of it ("partial"), with its video and no "report", or "after" it; "" lives."""

    def __init__(self, batch: Batch, nodes: dict[str, str], deaths: dict[str, list[str]] | None = None) -> None:
        folder = batch.results.folder
        self.orders = Orders(
            open_pipeline=lambda: None, maker=batch.maker, model=folder / "model", folder=folder, verbose=False
        )  # fmt: skip
        self.nodes, self.deaths = dict(nodes), {place: deque(each) for place, each in (deaths or {}).items()}
        self.workers: dict[str, Worker] = {}
        self.events: list[Event] = []
        self.given: list[tuple[str, int]] = []
        self.lacks: dict[str, set[int]] = {}
        self.stop_at: int | None = None

    def places(self):
        return self.nodes

    def _dies(self, place: str) -> str:
        planned = self.deaths.get(place)
        return planned.popleft() if planned else ""

    def _died(self, place: str) -> None:
        self.events.append(Event(place=place, kind="died", words="killed"))

    def start(self, place):
        if self._dies(place) == "open":
            return self._died(place)
        self.workers[place] = Worker(self.orders, self.nodes[place])
        self.workers[place]._pipeline = object()
        self.events.append(Event(place=place, kind="ready"))

    def give(self, place, job, *, again):
        self.given.append((place, job.place))
        if job.place in self.lacks.get(self.nodes[place], set()):
            return self.events.append(Event(place=place, kind="lacks", words="a.png"))
        moment = self._dies(place)
        partial = job.video.with_name(f"{job.video.stem}.partial.mp4")
        if moment == "partial":
            partial.write_bytes(b"half")
        elif moment != "before":
            kind, words, report = self.workers[place].make(job, again=again)
        if moment == "no report":
            job.report.unlink()
        if not moment:
            return self.events.append(Event(place=place, kind=kind, words=words, report=report))
        if moment == "after, gone":
            self.nodes.pop(place)
        self._died(place)

    def wait(self, seconds):
        if self.stop_at is not None and len(self.given) >= self.stop_at:
            raise KeyboardInterrupt
        event, self.events = self.events[:1], self.events[1:]
        return event


TWO = {"a/0": "a", "b/0": "b"}


def states(batch: Batch) -> list[str]:
    return [each.state for each in batch.results.jobs]


@pytest.mark.parametrize(
    ("deaths", "made_times"),
    [
        ({}, 6),
        ({"a/0": ["open"]}, 6),
        ({"a/0": ["", "before"]}, 6),
        ({"b/0": ["", "", "partial"]}, 6),
        ({"a/0": ["", "after"]}, 6),  # finished, though nobody heard of it: known by its files
        ({"a/0": ["", "after, gone"]}, 6),
        ({"a/0": ["", "no report"]}, 7),
        ({"a/0": ["", "before", "open", "before"], "b/0": ["", "before", "", "partial"]}, 6),
        ({"a/0": ["open"] * 3}, 6),
    ],
)
def test_whenever_workers_die_all_are_made_once(batch, made, deaths, made_times):
    of = batch(6)
    Spread(of, FakePool(of, TWO, deaths)).make()
    assert states(of) == ["made"] * 6
    assert [each.place for each in of.results.jobs] == [1, 2, 3, 4, 5, 6]
    assert all(each.frames == 12 for each in of.results.jobs)
    assert len(made) == made_times
    assert len(set(made)) == 6
    assert not list(of.results.folder.glob("*partial*"))
    kept = json.loads((of.results.folder / "results.json").read_text())
    assert kept["counts"] == {"made": 6}


def test_a_job_that_kills_its_workers_is_given_up_and_the_others_made(batch, made):
    of = batch(3)
    pool = FakePool(of, TWO)
    give = pool.give
    pool.give = lambda place, job, again: pool._died(place) if job.place == 1 else give(place, job, again=again)
    Spread(of, pool).make()
    assert states(of) == ["failed", "made", "made"]
    assert "3 workers died while they made it, the last on" in of.results.jobs[0].reason
    assert "killed" in of.results.jobs[0].reason


def test_errors_come_with_their_words(batch, made):
    of = batch(3, {2: "fail"})
    Spread(of, FakePool(of, TWO)).make()
    assert states(of) == ["made", "failed", "made"]
    assert of.results.jobs[1].reason == "it cannot be"
    assert made.count("j2.mp4") == 1  # an error is no death


@pytest.mark.parametrize(
    ("lacks", "expected"),
    [
        ({"a": {1}}, "made"),
        ({"b": {1}}, "made"),
        ({"a": {1, 2}, "b": {3}}, "made"),
        ({"a": {1, 2, 3}}, "made"),
        ({"a": {1}, "b": {1}}, "failed"),
    ],
)
def test_a_node_that_lacks_a_file_leaves_the_job_to_others(batch, made, lacks, expected):
    of = batch(3)
    pool = FakePool(of, TWO)
    pool.lacks = lacks
    Spread(of, pool).make()
    assert states(of) == [expected, "made", "made"]
    if expected == "failed":
        assert "a lacks a.png" in of.results.jobs[0].reason
        assert "b lacks a.png" in of.results.jobs[0].reason


def test_one_job_and_the_first_node_lacks_it(batch, made):
    of = batch(1)
    pool = FakePool(of, TWO)
    pool.lacks = {"a": {1}}
    Spread(of, pool).make()
    assert states(of) == ["made"]


def test_interrupted(batch, made):
    of = batch(5)
    pool = FakePool(of, TWO)
    pool.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        Spread(of, pool).make()
    kept = json.loads((of.results.folder / "results.json").read_text())["jobs"]
    found = [each["state"] for each in kept]
    assert found.count("cut") == 2
    assert found.count("made") == 1
    assert found.count("waiting") == 2


def test_no_worker_at_all(batch, made):
    of = batch(2)
    with pytest.raises(DistributedError, match="no worker could start: a: its worker died 3 times, at last: killed"):
        Spread(of, FakePool(of, {"a/0": "a"}, {"a/0": ["open"] * 3})).make()
    assert states(of) == ["waiting", "waiting"]
    with pytest.raises(DistributedError, match="no node is alive"):
        Spread(of, FakePool(of, {})).make()


def test_the_last_worker_goes(batch, made):
    of = batch(3)
    Spread(of, FakePool(of, {"a/0": "a"}, {"a/0": ["", "after, gone"]})).make()
    assert states(of) == ["made", "failed", "failed"]
    assert "no worker is left" in of.results.jobs[1].reason


def test_what_is_made_where_it_is_not_seen_is_no_success(batch, made):
    of = batch(1)
    pool = FakePool(of, TWO)
    pool.give = lambda place, job, again: pool.events.append(Event(place=place, kind="made"))
    Spread(of, pool).make()
    assert states(of) == ["failed"]
    assert "let all nodes see the same folder" in of.results.jobs[0].reason


def orders(of: Batch, **changes) -> Orders:
    folder = of.results.folder
    return Orders(**{"open_pipeline": object, "maker": of.maker, "model": folder / "model", "folder": folder} | changes)


@pytest.mark.parametrize("lost", ["", "model", "other model", "folder"])
def test_a_node_without_the_files(batch, tmp_path, lost, monkeypatch):
    monkeypatch.setattr("lowvram.batch.worker._log_as", lambda node, verbose: None)
    of = batch(1)
    of.results.save()
    changes = {"model": {"model": tmp_path / "gone"}, "folder": {"folder": tmp_path / "gone"}}.get(lost, {})
    if lost == "other model":
        (tmp_path / "model" / "manifest.json").write_text("[]")
    kind, words, _ = Worker(orders(of, **changes), "a").open()
    assert kind == ("unfit" if lost else "ready")
    assert ("same storage under the same path" in words) == bool(lost)


def test_a_worker_leaves_what_somebody_still_writes(batch, made):
    of = batch(1)
    worker = Worker(orders(of), "a")
    worker._pipeline = object()
    ((job, _),) = of.waiting
    with writing(job.video, "lowvram infer"):
        kind, words, _ = worker.make(job, again=True)
    assert kind == "failed"
    assert "is being written by" in words
    job.request.audio.unlink()
    assert worker.make(job, again=False)[:2] == ("lacks", str(job.request.audio))


@pytest.mark.parametrize("gone", ["", "b.png", "b.wav", "left.png", "right.png", "p.mp4"])
def test_a_worker_lacks_any_file_of_several_people(batch, made, tmp_path, monkeypatch, gone):
    of = batch(1)
    worker = Worker(orders(of), "a")
    worker._pipeline = object()
    ((job, _),) = of.waiting
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "b.wav", "left.png", "right.png", "p.mp4"):
        (tmp_path / name).write_bytes(b"")
    several = {"image": Path("a.png+b.png"), "audio": Path("a.wav+b.wav"), "pose_video": Path("p.mp4")}
    request = dataclasses.replace(job.request, masks=(Path("left.png"), Path("right.png")), **several).absolute()
    monkeypatch.chdir("/")
    if gone:
        (tmp_path / gone).unlink()
    kind, words, _ = worker.make(dataclasses.replace(job, request=request), again=False)
    assert (kind, words) == (("lacks", str(tmp_path / gone)) if gone else ("made", ""))


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
                assert run.wait(timeout=90) == 0, said.read_text()
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
    end = time.monotonic() + 120
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
