"""The page: what it shows, and that it takes no file but those that were uploaded to it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from lowvram.memory_log.rows import Row
from lowvram.serve import page_parts as parts
from lowvram.serve.api import Api, make_app
from lowvram.serve.errors import Refused
from lowvram.serve.guard import Access
from lowvram.serve.jobs import BROKEN, CANCELLED, DONE, FAILED, QUEUED, RUNNING, Job, Progress, new_id
from lowvram.serve.page import mounted
from lowvram.serve.page_actions import FIELDS, Actions
from lowvram.serve.presets import Preset, Presets
from lowvram.serve.queue import WorkQueue
from lowvram.serve.server import Address, guarded
from lowvram.serve.store import UPLOADS, Store, uploaded
from tests.lowvram.serve.fakes import PRESETS, FakeMaker, picture, running, second_person, until, voice

FORM = ["A person", None, "128*128", 1, 48, 4, None, 0, None, "30", False, True]
NO_SECOND = [None] * 5


def job(state: str = RUNNING, **changes: Any) -> Job:
    settings = {"prompt": "A <b>person</b>", "size": "704*384"}
    return Job(id=new_id(), created=1e9, settings=settings, state=state, **changes)


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (None, "Nothing is being made"),
        (job(QUEUED), "Queued: 2 before it"),
        (job(RUNNING), "portrait, voice and prompt are read"),
        (job(RUNNING, progress=Progress(frames=12, total_frames=48, seconds_left=75.0)), "12 of 48 frames, 1 min 15 s"),
        (job(RUNNING, progress=Progress(memory={"rss": 2**31, "reserved": 2**33})), "GPU 8.0"),
        (job(DONE, started=1.0, ended=4.0, progress=Progress(frames=48, total_frames=48)), "Done in 3 s, 48 of 48"),
        (job(FAILED, reason="<script>"), "Failed, no frame: &lt;script&gt;"),
        (job(BROKEN, progress=Progress(frames=12, total_frames=48)), "Broken off, 12 of 48"),
        (job(CANCELLED, reason=CANCELLED), "Cancelled, no frame"),
    ],
    ids=lambda value: value.state if isinstance(value, Job) else str(value)[:20],
)  # fmt: skip
def test_progress(shown: Job | None, words: str):
    assert words in parts.progress(shown, 2)


def test_what_a_client_wrote_is_text():
    listed = [job(state, reason='"><script>') for state in (QUEUED, RUNNING, DONE, FAILED)]
    written = parts.history(listed) + "".join(parts.player(each) + parts.progress(each, 0) for each in listed)
    assert "<script>" not in written
    assert "<b>" not in written
    assert "A &lt;b&gt;person" in written


def test_parts():
    assert parts.history([]).startswith("<p")
    assert "10 older ones" in parts.history([job(DONE) for _ in range(40)])
    assert "svg+xml" in parts.memory([Row(time_s=0.0, rss=2**30), Row(time_s=1.0, rss=2**30)])
    assert [parts.duration(seconds) for seconds in (0.4, 59.4, 61, 3725)] == ["0 s", "59 s", "1 min 01 s", "1 h 02 min"]
    predicted = Preset(name="best", size="704*384", frames_per_second=7.06, vram_bytes=22 * 2**30)
    words, name = parts.presets(Presets(presets=(predicted,), device="cuda"))[0]
    assert (words, name) == ("best: 704*384, 7.1 frames/s, 22.00 GiB", "best")


class Asked:
    """A browser that says what it likes to the page's function of the button Make."""

    def __init__(self, client: TestClient, api: Api):
        self.client, self.actions = client, Actions(api)
        config = json.loads(re.search(r"window.gradio_config = (\{.*?\});</script>", client.get("/").text)[1])
        self.make = next(each["id"] for each in config["components"] if each["props"].get("elem_id") == "lv-make")
        self.function = next(each["id"] for each in config["dependencies"] if [self.make, "click"] in each["targets"])

    def upload(self, name: str, data: bytes) -> str:
        return self.client.post("/gradio_api/upload", files={"files": (name, data)}).json()[0]

    def send(self, image: str, audio: str, second: list[str | None] | None = None, **more: Any) -> str:
        data = {"meta": {"_type": "gradio.FileData"}, "orig_name": "a", **more}
        files, others = (
            [None if path is None else {**data, "path": path} for path in paths]
            for paths in ((image, audio), second or NO_SECOND)
        )
        asked = {
            "data": [None, None, *files, *FORM, *others],
            "fn_index": self.function,
            "session_hash": "s",
            "trigger_id": self.make,
        }
        assert self.client.post("/gradio_api/queue/join", json=asked).status_code == 200
        return self.client.get("/gradio_api/queue/data?session_hash=s").text


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkQueue]:
    with running(tmp_path_factory.mktemp("page") / "s", FakeMaker(free=True)) as queue:
        yield queue


@pytest.fixture(scope="module")
def asked(queue: WorkQueue) -> Iterator[Asked]:
    app, api = make_app(queue, lambda: PRESETS)
    guard = guarded(mounted(app, api), queue, Address())
    assert Access.at("127.0.0.1", 7860, None) == guard.access
    with TestClient(guard, base_url="http://127.0.0.1:7860") as client:
        yield Asked(client, api)


@pytest.mark.parametrize("more", [{}, {"is_stream": True}, {"url": "http://127.0.0.1:7860/x"}], ids=str)
@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd", "http://192.0.2.1/a.png", "https://192.0.2.1/a.png", "../jobs", "/", "{outside}", "{link}",
        "{uploads}/../outside.png", "data:image/png;base64,AAAA", "{uploads}",
    ],
)  # fmt: skip
def test_files_that_were_not_uploaded(asked: Asked, queue: WorkQueue, path: str, more: dict[str, Any]):
    uploads, outside = queue.store.folder / UPLOADS, queue.store.folder / "outside.png"
    outside.write_bytes(picture())
    link = uploads / "link.png"
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    before = sorted(uploads.rglob("*"))
    given = path.format(outside=outside, link=link, uploads=uploads)
    assert "is no file that was uploaded" in asked.send(given, given, **more) or path == "data:image/png;base64,AAAA"
    assert sorted(uploads.rglob("*")) == before
    assert not queue.store.jobs()
    assert asked.client.get(f"/gradio_api/file={given}").status_code in (403, 404)


@pytest.mark.parametrize(
    "path",
    ["file=http://evil.example", "file=https://evil.example", "proxy=https://evil.example/", "process_recording",
     "info", "vibe-code", "call/make", "run/make", "file/etc/passwd", "run-history/records"],
)  # fmt: skip
def test_routes_of_gradio_that_the_page_does_not_need(asked: Asked, path: str):
    for method in ("GET", "POST"):
        answer = asked.client.request(method, f"/gradio_api/{path}", follow_redirects=False)
        assert answer.status_code == 404
        assert "no route of the page" in answer.json()["error"]


def test_the_page_makes_a_video(asked: Asked, queue: WorkQueue, tmp_path: Path):
    image, audio = asked.upload("a.png", picture()), asked.upload("a.wav", voice(tmp_path))
    assert Path(image).is_relative_to(queue.store.folder / UPLOADS)
    assert '"success":true' in asked.send(image, audio)
    until(lambda: [job.state for job in queue.store.jobs()] == [DONE])
    assert queue.store.jobs()[0].settings["base_seed"] == 1
    assert "choose a file" in asked.send("", audio) or "uploaded" in asked.send("", audio)


SECONDS: dict[str, list[str]] = {
    "a voice": ["audio2"],
    "a portrait and a voice": ["image2", "audio2"],
    "masks": ["audio2", "mask", "mask2"],
    "poses": ["pose_video"],
    "all but a portrait": ["audio2", "mask", "mask2", "pose_video"],
}


@pytest.mark.parametrize("case", SECONDS)
def test_a_second_person_is_sent_and_taken_up_again(asked: Asked, queue: WorkQueue, tmp_path: Path, case: str):
    content = second_person(tmp_path)
    names = FIELDS[-len(NO_SECOND) :]
    second = [asked.upload(f"{name}.bin", content[name]) if name in SECONDS[case] else None for name in names]
    before = {job.id for job in queue.store.jobs()}
    said = asked.send(asked.upload("a.png", picture()), asked.upload("a.wav", voice(tmp_path)), second)
    assert '"success":true' in said
    (new,) = {job.id for job in queue.store.jobs()} - before
    there = queue.store.place(new)
    assert [path.name for path in there.sent(*names)] == [name for name in names if name in SECONDS[case]]
    taken = dict(zip(FIELDS, asked.actions.take_up(new), strict=True))
    for name in names:
        assert (taken[name] is not None) == (name in SECONDS[case])
        assert taken[name] is None or Path(taken[name]).read_bytes() == content[name]


@pytest.mark.parametrize("place", range(5))
def test_no_file_of_a_second_person_but_what_was_uploaded(asked: Asked, queue: WorkQueue, tmp_path: Path, place: int):
    before = len(queue.store.jobs())
    second = [None] * place + ["/etc/passwd"] + [None] * (4 - place)
    said = asked.send(asked.upload("a.png", picture()), asked.upload("a.wav", voice(tmp_path)), second)
    assert "is no file that was uploaded" in said
    assert len(queue.store.jobs()) == before


def test_what_is_uploaded_is_a_file_of_its_folder(tmp_path: Path):
    with Store(tmp_path / "s") as store:
        uploads = store.folder / UPLOADS
        (uploads / "a").write_text("")
        assert uploaded(str(uploads / "a"), uploads) == uploads / "a"
        for wrong in (uploads, uploads / "b", "a", "", "\0", "x" * 5000, uploads / ".." / "jobs", "/dev/null"):
            with pytest.raises(Refused):
                uploaded(wrong, uploads)
