"""The API without a model: jobs from begin to end, and that it lives on."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lowvram.serve import streams
from lowvram.serve.jobs import CANCELLED, DONE, FAILED, RUNNING
from lowvram.serve.limits import Limits
from lowvram.serve.queue import WorkQueue
from lowvram.serve.streams import growing_video
from tests.lowvram.serve.fakes import (
    PARTS,
    PICTURE,
    FakeMaker,
    add,
    client_of,
    running,
    send,
    settled,
    until,
    untouched,
)


def test_a_job_from_begin_to_end(taking: TestClient, working: WorkQueue, sound: bytes):
    sent = send(taking, sound, base_seed="7", num_clip="", online_decode="false")
    assert sent.status_code == 202, sent.text
    name = sent.json()["id"]
    assert sent.headers["location"] == f"/api/jobs/{name}"
    settled(working, name, DONE)
    job = taking.get(f"/api/jobs/{name}").json()
    assert job["settings"]["base_seed"] == 7
    assert job["settings"]["num_clip"] is None
    assert job["settings"]["online_decode"] is False
    assert job["progress"]["share"] == 1.0
    assert [each["id"] for each in taking.get("/api/jobs").json()] == [name]
    assert taking.get(f"/api/jobs/{name}/portrait").content.startswith(b"\xff\xd8")
    assert taking.get(f"/api/jobs/{name}/memory").json() == {"rows": []}
    assert taking.get(f"/api/jobs/{name}/report").json() == {}
    part = taking.get(f"/api/jobs/{name}/video", headers={"range": "bytes=1-1"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"\2", f"bytes 1-1/{PARTS}")
    assert taking.delete(f"/api/jobs/{name}").status_code == 204
    assert taking.get(f"/api/jobs/{name}").status_code == 404
    assert untouched(working)


def test_settings_as_json(taking: TestClient, sound: bytes):
    settings = {"prompt": "Ä person", "size": "128*128", "cond_rope_distance": "random", "base_seed": -1}
    files = {"image": PICTURE, "audio": sound}
    job = taking.post("/api/jobs", files=files, data={"settings": json.dumps(settings)}).json()
    assert job["settings"]["prompt"] == "Ä person"
    assert job["settings"]["cond_rope_distance"] == "random"
    assert 0 <= job["settings"]["base_seed"] < 2**31


def test_events_and_video_follow_a_job(tmp_path: Path, sound: bytes):
    maker = FakeMaker()
    with running(tmp_path / "s", maker) as queue, client_of(queue) as client, ThreadPoolExecutor(2) as pool:
        name = send(client, sound).json()["id"]
        followed = pool.submit(lambda: client.get(f"/api/jobs/{name}/events").text)
        video = pool.submit(lambda: client.get(f"/api/jobs/{name}/video").content)
        for part in range(1, PARTS + 1):
            maker.go_on()
            until(lambda part=part: queue.store.job(name).progress.frames == part)
        assert video.result(10) == bytes(range(1, PARTS + 1))
        states = [json.loads(line[6:]) for line in followed.result(10).splitlines() if line.startswith("data: ")]
        assert states[-1]["state"] == DONE
        assert [each["progress"]["frames"] for each in states] == sorted(each["progress"]["frames"] for each in states)
        assert len(states) > 1


def test_a_video_that_is_made_between_two_looks_comes_whole(tmp_path: Path, monkeypatch):
    """It has the name of a finished one when it is looked for again."""
    maker = FakeMaker()

    async def slept(seconds: float) -> None:
        maker.run_free()
        until(lambda: queue.store.job(job.id).state == DONE)

    async def streamed() -> bytes:
        return b"".join([chunk async for chunk in growing_video(queue, job.id)])

    with running(tmp_path / "s", maker) as queue:
        first, job = (add(queue) for _ in range(2))
        until(lambda: queue.store.job(first.id).state == RUNNING)
        monkeypatch.setattr(streams.asyncio, "sleep", slept)
        assert asyncio.run(streamed()) == bytes(range(1, PARTS + 1))


def test_cancel(tmp_path: Path, sound: bytes):
    maker = FakeMaker()
    with running(tmp_path / "s", maker) as queue, client_of(queue) as client:
        first, second = (send(client, sound).json()["id"] for _ in range(2))
        until(lambda: queue.store.job(first).state == RUNNING)
        assert client.delete(f"/api/jobs/{first}").status_code == 409
        assert client.get(f"/api/jobs/{second}").json()["position"] == 1
        assert client.post(f"/api/jobs/{second}/cancel").json()["state"] == CANCELLED
        assert client.get(f"/api/jobs/{second}/video").status_code == 404
        assert client.post(f"/api/jobs/{first}/cancel").json()["state"] == RUNNING
        maker.go_on()
        settled(queue, first, CANCELLED)
        assert client.get(f"/api/jobs/{first}/video").content == b"\1"
        assert client.post(f"/api/jobs/{first}/cancel").status_code == 409


def test_two_hundred_at_once(tmp_path: Path, sound: bytes):
    maker, limits = FakeMaker(), Limits(queue=5)
    with running(tmp_path / "s", maker, limits) as queue, client_of(queue) as client, ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: send(client, sound), range(200)))
        found = [answer.status_code for answer in answers]
        assert set(found) == {202, 429}
        assert 5 <= found.count(202) <= 6  # one is being made, and left its place to another
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert "the queue is full" in refused.json()["error"]
        assert refused.headers["retry-after"]
        maker.run_free()
        until(lambda: all(job.state == DONE for job in queue.store.jobs()))
        assert send(client, sound).status_code == 202


def test_a_job_that_fails_says_why(working: WorkQueue, taking: TestClient, maker: FakeMaker, sound: bytes):
    maker.fail = RuntimeError("something")
    name = send(taking, sound).json()["id"]
    settled(working, name, FAILED)
    assert taking.get(f"/api/jobs/{name}").json()["reason"] == "RuntimeError: something"
    assert taking.get(f"/api/jobs/{name}/report").status_code == 404


def test_listeners_are_bounded(tmp_path: Path, sound: bytes):
    maker, limits = FakeMaker(), Limits(listeners=2)
    with running(tmp_path / "s", maker, limits) as queue, client_of(queue) as client, ThreadPoolExecutor(2) as pool:
        name = send(client, sound).json()["id"]
        until(lambda: queue.store.job(name).state == RUNNING)
        followed = [pool.submit(client.get, f"/api/jobs/{name}/{what}") for what in ("events", "video")]
        until(lambda: client.api.listening == 2)
        assert client.get(f"/api/jobs/{name}/video").status_code == 429
        maker.run_free()
        assert [each.result(10).status_code for each in followed] == [200, 200]
        assert client.get(f"/api/jobs/{name}/events").status_code == 200


def test_docs_are_of_the_schema_and_ask_nobody(client: TestClient):
    page, schema = client.get("/api/docs").text, client.get("/api/openapi.json").json()
    assert [path for path in schema["paths"] if path not in page] == []
    assert "cond_rope_distance" in page
    assert "//" not in page.replace("http://www.w3.org", "")
    assert client.get("/api/presets").json()["presets"][0]["name"] == "light"


@pytest.mark.parametrize("state", [RUNNING, CANCELLED, FAILED])
def test_only_what_is_done_is_compared(taking: TestClient, working: WorkQueue, state: str):
    jobs = [add(working) for _ in range(2)]
    for job in jobs:
        settled(working, job.id, DONE)
    working.store.change(jobs[0].id, state=state)
    pair = {"a": jobs[0].id, "b": jobs[1].id}
    assert taking.post("/api/compare", json=pair).status_code == 409
    working.store.change(jobs[0].id, state=DONE)
    assert taking.post("/api/compare", json=pair).status_code == 422  # these reports are none
