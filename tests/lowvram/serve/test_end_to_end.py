"""The real thing: a tiny model behind uvicorn, asked over HTTP."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import httpx
import pytest

from lowvram.serve.jobs import BROKEN, CANCELLED, DONE, RUNNING
from tests.lowvram.serve.fakes import FakeMaker, client_of, until
from tests.lowvram.serve.fakes import running as working

HERE = Path(__file__).parents[3]


class Served:
    """`lowvram serve` as a process; `url` is what it says on stdout."""

    def __init__(self, model: Path, folder: Path, *options: str):
        command = [sys.executable, "-m", "lowvram", "serve", "--model", str(model), "--dir", str(folder), "--port", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_PROXY": "*"}
        self.said = folder.with_suffix(".log")
        with self.said.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--device", "cpu", *options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                cwd=HERE,
            )
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def end(self) -> int:
        self.client.close()
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)


@pytest.fixture
def model(tiny) -> Path:
    return tiny.artifact("int8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "served"


@pytest.fixture
def served(model: Path, folder: Path) -> Iterator[Served]:
    there = Served(model, folder, "--max-upload", "1MiB")
    yield there
    if there.process.poll() is None:
        there.end()


def send(client: httpx.Client, tiny, **settings: object) -> dict:
    files = {"image": tiny.portrait.read_bytes(), "audio": tiny.voice.read_bytes()}
    asked = {"prompt": "A person speaks", "size": "128*128", "infer_frames": 16, "sample_steps": 2, **settings}
    answer = client.post("/api/jobs", files=files, data={"settings": json.dumps(asked)})
    assert answer.status_code == 202, answer.text
    return answer.json()


def wait(client: httpx.Client, name: str, *states: str) -> dict:
    end = time.monotonic() + 60
    while (job := client.get(f"/api/jobs/{name}").json())["state"] not in states:
        assert time.monotonic() < end, job
        time.sleep(0.05)
    return job


def frames(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def frames_before_the_end(client: httpx.Client, name: str) -> tuple[int, bytes]:
    """Frames that decode of what has come while the job runs; and all of the stream."""
    taken, early = b"", 0
    with client.stream("GET", f"/api/jobs/{name}/video") as stream:
        for chunk in stream.iter_raw():
            taken += chunk
            if not early and client.get(f"/api/jobs/{name}").json()["state"] == RUNNING:
                try:
                    early = frames(taken)
                except av.FFmpegError:
                    continue
    return early, taken


def test_from_a_form_to_a_video_and_over_a_restart(served: Served, tiny, folder: Path):
    client = served.client
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", served.url)
    first = send(client, tiny, audio_duration=1.4)
    early, streamed = frames_before_the_end(client, first["id"])
    done = wait(client, first["id"], DONE)
    assert 0 < early < frames(streamed)
    assert frames(streamed) == frames(client.get(f"/api/jobs/{first['id']}/video").content) == 35
    assert done["progress"]["share"] == 1.0
    assert done["progress"]["memory"]["rss"] > 2**20
    assert client.get(f"/api/jobs/{first['id']}/report").json()["frames"] >= 35
    rows = client.get(f"/api/jobs/{first['id']}/memory").json()["rows"]
    assert {row["event"] for row in rows} == {"sample", "begin", "end"}
    assert "<svg" in client.get(f"/api/jobs/{first['id']}/memory.svg").text

    compared = client.post("/api/compare", json={"a": first["id"], "b": first["id"]})
    assert compared.status_code == 201, compared.text
    assert "PSNR" in client.get(compared.json()["page"]).text
    refused_over_http(client)

    running, waiting, broken = (send(client, tiny) for _ in range(3))
    wait(client, running["id"], RUNNING)
    assert client.post(f"/api/jobs/{running['id']}/cancel").status_code == 200
    wait(client, running["id"], CANCELLED)
    client.post(f"/api/jobs/{waiting['id']}/cancel")
    again = send(client, tiny)
    wait(client, broken["id"], RUNNING)
    assert served.end() == 0
    assert "Traceback" not in served.said.read_text()

    with working(folder, FakeMaker(free=True)) as queue, client_of(queue) as client:
        states = {job["id"]: job["state"] for job in client.get("/api/jobs").json()}
        assert states[first["id"]] == DONE
        assert states[running["id"]] == states[waiting["id"]] == CANCELLED
        assert states[broken["id"]] == BROKEN
        until(lambda: queue.store.job(again["id"]).state == DONE)
        assert frames(client.get(f"/api/jobs/{first['id']}/video").content) == 35


def refused_over_http(client: httpx.Client) -> None:
    """What is too large is answered although it is still being sent; of many at once those beyond the queue are."""

    def endless() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(64):
            yield bytes(2**16)

    form = {"content-type": "multipart/form-data; boundary=x"}
    for content in (endless(), b"".join(endless())):
        answer = client.post("/api/jobs", content=content, headers=form)
        assert answer.status_code == 413, answer.text
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as leaves:
        head = f"POST /api/jobs HTTP/1.1\r\nHost: {client.base_url.host}\r\nContent-Type: {form['content-type']}\r\n"
        leaves.sendall(f"{head}Content-Length: 5000\r\n\r\n--x\r\n".encode())
    page = client.get("/")
    assert "window.gradio_config" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    files = {"image": b"no picture", "audio": b"no sound"}
    with ThreadPoolExecutor(50) as pool:
        answers = pool.map(
            lambda _: client.post("/api/jobs", files=files, data={"prompt": "a"}).status_code, range(200)
        )
        assert set(answers) <= {422, 429}
