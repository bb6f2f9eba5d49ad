"""The API without a model: what it takes, what it refuses, and that it lives on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from lowvram.serve.guard import Access
from lowvram.serve.jobs import CANCELLED, DONE, FAILED, RUNNING
from lowvram.serve.limits import MIB, Limits
from lowvram.serve.queue import WorkQueue
from tests.lowvram.serve.fakes import PARTS, FakeMaker, add, client_of, picture, running, until, voice

PICTURE = picture()
FORM = {"prompt": "A person speaks", "size": "128*128"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return voice(tmp_path_factory.mktemp("voice"))


LIMITS = Limits(upload_bytes=MIB, seconds=5, queue=4)


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkQueue]:
    """For requests that are refused, of which nothing may be left."""
    with running(tmp_path_factory.mktemp("refusing") / "s", FakeMaker(free=True), LIMITS) as queue:
        yield queue


@pytest.fixture(scope="module")
def client(queue: WorkQueue) -> Iterator[TestClient]:
    with client_of(queue) as client:
        yield client


@pytest.fixture
def maker() -> FakeMaker:
    return FakeMaker(free=True)


@pytest.fixture
def working(tmp_path: Path, maker: FakeMaker) -> Iterator[WorkQueue]:
    """For those that are taken."""
    with running(tmp_path / "s", maker, LIMITS) as queue:
        yield queue


@pytest.fixture
def taking(working: WorkQueue) -> Iterator[TestClient]:
    with client_of(working) as client:
        yield client


def send(client: TestClient, sound: bytes, image: bytes = PICTURE, **fields: Any):
    files = {"image": ("../../evil.png", image, "image/png"), "audio": ("/etc/passwd", sound, "audio/wav")}
    return client.post("/api/jobs", files=files, data={**FORM, **fields})


def settled(queue: WorkQueue, name: str, state: str) -> None:
    until(lambda: queue.store.job(name).state == state)


def untouched(queue: WorkQueue) -> bool:
    """Whether nothing of what was refused is left."""
    folder = queue.store.folder
    return not queue.store.jobs() and not [
        path for path in folder.rglob("*") if path.is_file() and ".lock" not in path.name
    ]


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


WRONG_SETTINGS = [
    ({"prompt": ""}, 422, "prompt is missing"),
    ({"prompt": "  "}, 422, "expected some text"),
    ({"prompt": "x" * 5000}, 422, "at most 4000"),
    ({"prompt": "x" * 200_000}, 413, "64 KiB"),
    ({"size": "wide"}, 422, "expected two numbers as A*B"),
    ({"size": "9999*9999"}, 422, "area"),
    ({"infer_frames": "13"}, 422, "13"),
    ({"infer_frames": "1000000"}, 422, "less than or equal to 240"),
    ({"infer_frames": "many"}, 422, "infer_frames is 'many'"),
    ({"num_clip": "0"}, 422, "--num_clip is 0"),
    ({"sample_steps": "0"}, 422, "--sample_steps is 0"),
    ({"sample_steps": "1e9"}, 422, "sample_steps"),
    ({"base_seed": "-2"}, 422, "--base_seed is -2"),
    ({"cond_rope_distance": "99"}, 422, "--cond-rope-distance is 99"),
    ({"audio_start": "-1"}, 422, "--audio-start"),
    ({"audio_start": "nan"}, 422, "audio_start is 'nan'"),
    ({"audio_start": "100"}, 422, "audio"),
    ({"audio_duration": "0"}, 422, "--audio-duration"),
    ({"audio_track": "2"}, 422, "track"),
    ({"image_path": "/etc/passwd"}, 422, "'image_path' is no setting; expected one of prompt"),
    ({"settings": "{"}, 422, "settings came as JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "status", "reason"), WRONG_SETTINGS, ids=lambda value: str(value)[:40])
def test_settings_that_cannot_be_used(
    client: TestClient, queue: WorkQueue, sound: bytes, fields: dict[str, str], status: int, reason: str
):
    refused = send(client, sound, **fields)
    assert refused.status_code == status, refused.text
    assert reason in refused.json()["error"]
    assert untouched(queue)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "no JSON"), ("[]", "no object"), ("null", "no object"), ("[" * 60_000, "no JSON"),
        ('{"prompt": 7}', "prompt is '7'"), ('{"prompt": "a", "image": "/etc/passwd"}', "is no setting"),
        ('{"prompt": "a", "audio_start": NaN}', "finite"), ('{"prompt": "a", "base_seed": 1e400}', "base_seed"),
        ("{}", "prompt is missing"),
    ],
)  # fmt: skip
def test_json_that_cannot_be_used(client: TestClient, queue: WorkQueue, sound: bytes, text: str, reason: str):
    refused = client.post("/api/jobs", files={"image": PICTURE, "audio": sound}, data={"settings": text})
    assert refused.status_code == 422
    assert reason in refused.json()["error"]
    assert untouched(queue)


BROKEN_IMAGES = {
    "text": (b"not a picture", "picture"),
    "pdf": (b"%PDF-1.7 ...", "image is a PDF"),
    "postscript": (b"%!PS-Adobe", "PostScript"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    "cut": (PICTURE[: len(PICTURE) // 2], "cannot be read"),
    "zeros": (bytes(1000), "picture"),
    "script": (b"#!/bin/sh\nrm -rf /", "picture"),
    "playlist": (b"#EXTM3U\nfile:///etc/passwd", "picture"),
    "bomb": (
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\x86\xa0\0\1\x86\xa0\x08\x02\0\0\0\xe1\x93\x9d\x9f", "image is too large",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_IMAGES)
def test_pictures_that_are_none(client: TestClient, queue: WorkQueue, sound: bytes, name: str):
    image, reason = BROKEN_IMAGES[name]
    refused = send(client, sound, image)
    assert refused.status_code == 422
    assert reason in refused.json()["error"] or name == "bomb"
    assert str(queue.store.folder) not in refused.text
    assert untouched(queue)


@pytest.mark.parametrize(
    ("name", "sound"),
    [
        ("text", b"not a sound"), ("picture", PICTURE), ("cut header", b"RIFF\xff\xff\xff\x7fWAVEfmt "),
        ("playlist", b"#EXTM3U\nfile:///etc/passwd"), ("concat", b"ffconcat version 1.0\nfile /etc/passwd"),
        ("zeros", bytes(5000)),
    ],
)  # fmt: skip
def test_sounds_that_are_none(client: TestClient, queue: WorkQueue, name: str, sound: bytes):
    refused = send(client, sound)
    assert refused.status_code == 422
    assert refused.json()["error"].startswith("audio")
    assert str(queue.store.folder) not in refused.text
    assert untouched(queue)


@pytest.mark.parametrize(
    ("seconds", "fields", "status"),
    [
        (6.0, {}, 413), (6.0, {"audio_duration": "4"}, 202), (6.0, {"num_clip": "1"}, 202), (0.05, {}, 422),
        (6.0, {"audio_start": "3"}, 202), (6.0, {"num_clip": "9"}, 413), (5.0, {}, 202),
    ],
)  # fmt: skip
def test_how_long_a_voice_may_be(taking: TestClient, tmp_path: Path, seconds: float, fields: Any, status: int):
    sent = send(taking, voice(tmp_path, seconds), **fields)
    assert sent.status_code == status, sent.text


def parts(*more: bytes, name: bytes = b"image") -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="' + name + b'"; filename="a"\r\n\r\n'
    return head + b"".join(more)


def chunks(body: bytes, size: int = 65536) -> Callable[[], Iterator[bytes]]:
    def each() -> Iterator[bytes]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    return each


FORM_TYPE = "multipart/form-data; boundary=x"
BODIES = [
    ("no form", b"{}", "application/json", 415, "expected a form"),
    ("no type", b"abc", None, 415, "'none'"),
    ("no boundary", b"abc", "multipart/form-data", 415, "expected a form"),
    ("long boundary", b"abc", "multipart/form-data; boundary=" + "x" * 500, 400, "boundary"),
    ("urlencoded", b"prompt=a", "application/x-www-form-urlencoded", 415, "expected a form"),
    ("empty", b"", FORM_TYPE, 400, "breaks off"),
    ("no parts", b"--x--\r\n", FORM_TYPE, 422, "image is missing"),
    ("garbage", b"\0" * 1000, FORM_TYPE, 400, "damaged"),
    ("cut", parts(b"abc"), FORM_TYPE, 400, "breaks off"),
    ("one file", parts(b"abc\r\n--x--\r\n"), FORM_TYPE, 422, "audio is missing"),
    ("empty file", parts(b"\r\n--x--\r\n"), FORM_TYPE, 422, "empty"),
    ("twice", parts(b"abc\r\n") + parts(b"abc\r\n--x--\r\n"), FORM_TYPE, 422, "twice"),
    ("no name", b"--x\r\nContent-Type: a/b\r\n\r\nabc\r\n--x--\r\n", FORM_TYPE, 422, "called ''"),
    ("many parts", b"".join(parts(b"\r\n", name=b"f%d" % n) for n in range(80)), FORM_TYPE, 413, "parts"),
    ("long header", b"--x\r\nA: " + b"b" * 100_000, FORM_TYPE, 400, "damaged"),
    ("no text", parts(b"\xff\xfe\r\n--x--\r\n", name=b"prompt"), FORM_TYPE, 422, "UTF-8"),
    ("large part", parts(b"a" * (MIB + 1)), FORM_TYPE, 413, "image is larger than 1 MiB"),
    ("large body", parts(b"a" * (4 * MIB)), FORM_TYPE, 413, "is larger than 1 MiB"),
    ("large field", parts(b"a" * 70_000, name=b"prompt"), FORM_TYPE, 413, "64 KiB"),
]


@pytest.mark.parametrize("stated", [True, False], ids=["with a length", "without"])
@pytest.mark.parametrize(("name", "body", "kind", "status", "reason"), BODIES, ids=[each[0] for each in BODIES])
def test_forms_that_are_none(
    client: TestClient,
    queue: WorkQueue,
    name: str,
    body: bytes,
    kind: str | None,
    status: int,
    reason: str,
    stated: bool,
):
    headers = {} if kind is None else {"content-type": kind}
    content: Any = body if stated else chunks(body)()
    refused = client.post("/api/jobs", content=content, headers=headers)
    assert refused.status_code == status, refused.text
    assert reason in refused.json()["error"] or name == "large body"
    assert untouched(queue)


@pytest.mark.parametrize("stated", [True, False], ids=["with a length", "without"])
@pytest.mark.parametrize(
    "path", ["/api/compare", "/api/jobs/0000000000000000/cancel", "/anything", "/api/presets", "/"]
)
def test_no_other_body_is_large(client: TestClient, path: str, stated: bool):
    body = b"a" * (2 * MIB)
    refused = client.post(path, content=body if stated else chunks(body)())
    assert refused.status_code in (404, 405, 413)
    if stated or path == "/api/compare":
        assert refused.status_code == 413


@pytest.mark.parametrize(
    "name",
    [
        "0" * 16,
        "..",
        "%2e%2e",
        "%2e%2e%2fjobs",
        "..%2f..%2fetc%2fpasswd",
        "a" * 500,
        "%00",
        "job.json",
        "０" * 16,
        "-1",
    ],
)
@pytest.mark.parametrize("rest", ["", "/video", "/events", "/memory", "/report", "/portrait", "/memory.svg"])
def test_ids_that_are_none(client: TestClient, name: str, rest: str):
    assert client.get(f"/api/jobs/{name}{rest}").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("PUT", "/api/jobs", 405), ("DELETE", "/api/jobs", 405), ("GET", "/docs", 404),
        ("GET", "/redoc", 404), ("GET", "/api/jobs/0000000000000000/memory?after=x", 422), ("GET", "/../jobs", 404),
        ("POST", "/api/compare", 422), ("GET", "/api/compare/0000000000000000/0000000000000000", 404),
    ],
)  # fmt: skip
def test_what_is_not_there(client: TestClient, method: str, path: str, status: int):
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421), ({"host": "127.0.0.1.evil.example:7860"}, 421), ({"host": ""}, 421),
        ({"host": "192.168.0.7:7860"}, 421), ({"host": "localhost:9999"}, 200), ({"host": "[::1]:7860"}, 200),
        ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403), ({"origin": "http://127.0.0.1:8000"}, 403),
        ({"origin": "http://127.0.0.1:7860"}, 200), ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200), ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200), ({"sec-fetch-site": "same-site"}, 403),
    ],
    ids=str,
)  # fmt: skip
def test_who_may_ask(client: TestClient, headers: dict[str, str], status: int):
    answer = client.get("/api/jobs", headers=headers)
    assert answer.status_code == status
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy


def test_a_post_of_another_site_does_nothing(client: TestClient, queue: WorkQueue, sound: bytes):
    files = {"image": PICTURE, "audio": sound}
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}):
        assert client.post("/api/jobs", files=files, data=FORM, headers=headers).status_code == 403
    assert untouched(queue)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/api/jobs", {}, 401), ("/api/jobs", {"authorization": "Bearer secret-token"}, 200),
        ("/api/jobs", {"authorization": "bearer  secret-token "}, 200),
        ("/api/jobs", {"authorization": "Basic secret-token"}, 401),
        ("/api/jobs", {"authorization": "Bearer wrong"}, 401), ("/api/jobs", {"authorization": "Bearer é"}, 401),
        ("/api/jobs?token=wrong", {}, 401), ("/api/jobs?token=", {}, 401), ("/api/jobs", {"cookie": "lowvram=x"}, 401),
        ("/api/jobs", {"cookie": "lowvram=secret-token"}, 401), ("/", {}, 401), ("/gradio_api/info", {}, 401),
        ("/api/docs", {}, 401), ("/api/openapi.json", {}, 401), ("/gradio_api/file=/etc/passwd", {}, 401),
    ],
    ids=str,
)  # fmt: skip
def test_token(queue: WorkQueue, path: str, headers: dict[str, str], status: int):
    raw = {name: value.encode("utf-8") for name, value in headers.items()}
    with client_of(queue, Access(token="secret-token", hosts=None)) as client:
        assert client.get(path, headers=raw, follow_redirects=False).status_code == status


def test_token_in_the_address_becomes_a_cookie(queue: WorkQueue):
    with client_of(queue, Access(token="secret-token", hosts=None)) as client:
        answer = client.get("/api/jobs?a=b%20c&token=secret-token", follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/api/jobs?a=b+c")
        assert "HttpOnly" in answer.headers["set-cookie"]
        assert "secret-token" not in answer.headers["set-cookie"]
        assert client.get("/api/jobs").status_code == 200
        away = client.get("//evil.example/?token=secret-token", follow_redirects=False)
        assert away.headers.get("location", "/").startswith("/")
        assert not away.headers.get("location", "/").startswith("//")


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
