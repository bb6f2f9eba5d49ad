"""Two people in one picture, and poses, as the API takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lowvram.pipeline import AvatarPipeline
from lowvram.serve.jobs import DONE
from lowvram.serve.limits import MIB, Limits
from lowvram.serve.making import PipelineMaker
from lowvram.serve.queue import WorkQueue
from lowvram.serve.settings import Settings
from lowvram.serve.store import FILES, NEEDED, Store
from tests.lowvram.serve.fakes import (
    FORM,
    PICTURE,
    FakeMaker,
    add,
    client_of,
    mask,
    running,
    second_person,
    settled,
    until,
    untouched,
    voice,
)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, sound: bytes) -> dict[str, bytes]:
    """Of each part of the form."""
    return {"image": PICTURE, "audio": sound} | second_person(tmp_path_factory.mktemp("second"))


def send(client: TestClient, files: dict[str, bytes], **fields: object):
    parts = {name: (f"../../{name}+b.png", data) for name, data in files.items()}
    return client.post("/api/jobs", files=parts, data={**FORM, **fields})


TAKEN = {
    "one": [],
    "two in a picture": ["audio2"],
    "a portrait each": ["image2", "audio2"],
    "masks": ["audio2", "mask", "mask2"],
    "poses": ["pose_video"],
    "two with poses": ["audio2", "mask", "mask2", "pose_video"],
}


@pytest.mark.parametrize("case", TAKEN)
@pytest.mark.parametrize("folder", ["s", "a.b+c/d+.e"])
def test_what_is_sent_is_asked_for(tmp_path: Path, content: dict[str, bytes], case: str, folder: str):
    names = [*NEEDED, *TAKEN[case]]
    with running(tmp_path / folder, FakeMaker(free=True)) as queue, client_of(queue) as client:
        sent = send(client, {name: content[name] for name in names})
        assert sent.status_code == 202, sent.text
        place = queue.store.place(sent.json()["id"])
        request = Settings.model_validate(sent.json()["settings"]).request(place)
        asked = [*request.portraits, *request.voices, *request.masks]
        asked += [] if request.pose_video is None else [request.pose_video]
        assert sorted(path.name for path in asked) == sorted(names)
        assert {path.parent for path in asked} == {place.folder}
        assert [path.read_bytes() for path in asked] == [content[path.name] for path in asked]
        assert client.get(f"/api/jobs/{sent.json()['id']}/portrait").status_code == 200


REFUSED = {
    "a portrait too many": (["image2"], {}, 422, "2 portraits for 1 voices"),
    "a mask and one voice": (["mask"], {}, 422, "there is one voice"),
    "masks and one voice": (["mask", "mask2"], {}, 422, "there is one voice"),
    "one mask of two": (["audio2", "mask"], {}, 422, "1 times for 2 voices"),
    "the other of two": (["audio2", "mask2"], {}, 422, "1 times for 2 voices"),
    "masks and portraits": (["image2", "audio2", "mask", "mask2"], {}, 422, "give one of both"),
    "no portrait": (["image2", "audio2"], {"image2": b"no picture"}, 422, "image2"),
    "no voice": (["audio2"], {"audio2": b"no sound"}, 422, "audio2"),
    "no mask": (["audio2", "mask", "mask2"], {"mask2": b"no picture"}, 422, "mask2"),
    "a mask without white": (["audio2", "mask", "mask2"], {"mask": mask((0, 0, 0, 0))}, 422, "mask has nothing white"),
    "no poses": (["pose_video"], {"pose_video": b"no video"}, 422, "pose_video"),
    "empty portrait": (["image2", "audio2"], {"image2": b""}, 422, "image2 is empty"),
    "empty voice": (["audio2"], {"audio2": b""}, 422, "audio2 is empty"),
    "empty mask": (["audio2", "mask"], {"mask": b""}, 422, "mask is empty"),
    "empty poses": (["pose_video"], {"pose_video": b""}, 422, "or one without it"),
    "large poses": (["pose_video"], {"pose_video": bytes(MIB + 1)}, 413, "pose_video is larger than 1 MiB"),
    "large mask": (["audio2", "mask2"], {"mask2": bytes(MIB + 1)}, 413, "mask2 is larger than 1 MiB"),
    "a part that is none": (["audio2"], {"audio3": b"x"}, 422, "'audio3' is no setting"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused(client: TestClient, queue: WorkQueue, content: dict[str, bytes], case: str):
    names, changed, status, reason = REFUSED[case]
    files = {name: content[name] for name in (*NEEDED, *names)}
    files |= changed
    refused = send(client, files)
    assert refused.status_code == status, refused.text
    assert reason in refused.json()["error"]
    assert str(queue.store.folder) not in refused.text
    assert untouched(queue)


@pytest.mark.parametrize(
    ("first", "second", "status"), [(1, 6, 413), (6, 1, 413), (6, 6, 413), (1, 4, 202), (4, 4, 202)]
)
def test_both_voices_have_a_limit(taking: TestClient, tmp_path: Path, first: int, second: int, status: int):
    sent = send(taking, {"image": PICTURE, "audio": voice(tmp_path, first), "audio2": voice(tmp_path, second)})
    assert sent.status_code == status, sent.text
    if status == 413:
        assert sent.json()["error"].startswith("audio lasts" if first > 5 else "audio2 lasts")


def test_all_files_at_their_limit_are_not_too_large_together(tmp_path: Path, content: dict[str, bytes]):
    """A body of so many: it comes as far as to be looked at."""
    most = max(map(len, content.values()))
    padded = {name: data.ljust(most, b"\0") for name, data in content.items()}
    with running(tmp_path / "s", FakeMaker(free=True), Limits(upload_bytes=most)) as queue, client_of(queue) as client:
        assert send(client, padded).status_code == 422  # masks and two portraits


def test_the_form_lists_them(client: TestClient):
    schema = client.get("/api/openapi.json").json()["paths"]["/api/jobs"]["post"]["requestBody"]
    form = schema["content"]["multipart/form-data"]["schema"]
    assert [name for name, facts in form["properties"].items() if facts.get("format") == "binary"] == list(FILES)
    assert form["required"] == ["image", "audio", "prompt"]
    page = client.get("/api/docs").text
    assert all(f"<code>{name}</code>" in page for name in FILES)


def test_jobs_of_before_open(tmp_path: Path):
    with running(tmp_path / "s", FakeMaker(free=True)) as queue:
        name = add(queue).id
        settled(queue, name, DONE)
    with Store(tmp_path / "s") as store:
        request = Settings.model_validate(store.job(name).settings).request(place := store.place(name))
        assert (request.portraits, request.voices) == ((place.image,), (place.audio,))
        assert (request.masks, request.pose_video) == ((), None)


def test_two_people_are_made(tiny, tmp_path: Path, content: dict[str, bytes]):
    pipeline = AvatarPipeline.from_artifact(tiny.artifact("int8"), device="cpu", resident=True)
    with (
        Store(tmp_path / "s") as store,
        WorkQueue(store, PipelineMaker(pipeline), Limits()) as queue,
        client_of(queue) as client,
    ):
        files = {name: data for name, data in content.items() if name != "image2"}
        settings = {"prompt": "Two speak", "size": "128*128", "infer_frames": 12, "num_clip": 1, "sample_steps": 1}
        answer = client.post("/api/jobs", files=files, data={"settings": json.dumps(settings)})
        assert answer.status_code == 202, answer.text
        name = answer.json()["id"]
        until(lambda: queue.store.job(name).ended is not None, 60)
        assert queue.store.job(name).state == DONE, queue.store.job(name)
        report = client.get(f"/api/jobs/{name}/report").json()
        assert len(report["other_voices"]) == 1
        assert len(report["settings"]["masks"]) == 2
        assert report["settings"]["pose_video"].endswith("/pose_video")
