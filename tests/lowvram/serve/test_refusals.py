"""What the API refuses, with which reason, and that nothing of it is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from lowvram.serve.limits import MIB
from lowvram.serve.queue import WorkQueue
from tests.lowvram.serve.fakes import (
    PICTURE,
    send,
    untouched,
    voice,
)

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
