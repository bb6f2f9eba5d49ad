"""Batches over several workers: deaths at every moment, all made once."""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from pathlib import Path

import pytest

from lowvram.batch.jobs import Job
from lowvram.batch.run import Batch
from lowvram.batch.spread import Event, Spread
from lowvram.batch.worker import Orders, Worker
from lowvram.media.samples import draw_portrait, synth_voice, write_wav
from lowvram.request import Request
from lowvram_kernels.errors import DistributedError
from lowvram_quantize.claims import writing
from lowvram_quantize.slabs import sha256_file


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
    assert of.results.jobs[1].reason == "it does not fit"
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
