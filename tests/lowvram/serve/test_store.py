"""What is kept of jobs, and what is read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowvram.serve.errors import Refused
from lowvram.serve.jobs import BROKEN, DONE, QUEUED, RUNNING, Job, new_id
from lowvram.serve.store import Store
from lowvram_kernels.errors import InputError

PATHS = [
    "..",
    "../jobs",
    ".",
    "",
    "/etc/passwd",
    "%2e%2e",
    "0" * 15,
    "0" * 17,
    "A" * 16,
    "g" * 16,
    "０" * 16,
    "0" * 16 + "\n",
]


def add(store: Store, prompt: str = "A person") -> Job:
    with store.incoming() as place:
        place.image.write_bytes(b"image")
        place.audio.write_bytes(b"audio")
        return store.add(place, {"prompt": prompt})


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_job_has_a_folder_with_names_of_ours(tmp_path: Path):
    with Store(tmp_path / "s") as store:
        job = add(store)
        assert files(store.place(job.id).folder) == {"image", "audio", "job.json"}
        assert store.job(job.id) == job


def test_what_is_not_taken_goes(tmp_path: Path):
    with Store(tmp_path / "s") as store:
        with store.incoming() as place:
            place.image.write_bytes(b"image")
        assert not store.jobs()
    assert not files(tmp_path)


def test_history_is_read_back(tmp_path: Path):
    with Store(tmp_path / "s") as store:
        jobs = [add(store, prompt) for prompt in ("a", "b", "c")]
        store.change(jobs[0].id, state=DONE, ended=1.0)
        store.change(jobs[1].id, state=RUNNING, started=1.0)
    with Store(tmp_path / "s") as store:
        found = store.jobs()
        assert [(job.id, job.state, job.settings["prompt"]) for job in found] == [
            (jobs[0].id, DONE, "a"),
            (jobs[1].id, BROKEN, "b"),
            (jobs[2].id, QUEUED, "c"),
        ]
        assert "process ended" in found[1].reason
        assert [job.id for job in store.waiting()] == [jobs[2].id]


def test_two_processes_do_not_share_a_folder(tmp_path: Path):
    with Store(tmp_path / "s"), pytest.raises(InputError, match="lowvram serve"), Store(tmp_path / "s"):
        pass


def test_order_stays_where_the_clock_is_set_back(tmp_path: Path, monkeypatch):
    with Store(tmp_path / "s") as store:
        first = add(store)
        monkeypatch.setattr("time.time", lambda: 1.0)
        second = add(store)
        assert [job.id for job in store.waiting()] == [first.id, second.id]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"id": "0"}', json.dumps(Job(id="0" * 16, created=1.0, settings={}).kept()),
        "state", "progress", "created", "settings", "reason",
    ],
)  # fmt: skip
def test_a_damaged_job_is_left_out_and_left_there(tmp_path: Path, text: str):
    with Store(tmp_path / "s") as store:
        whole, damaged = add(store), add(store)
        path = store.place(damaged.id).folder / "job.json"
    if text.isalpha() and text != "null":
        facts = json.loads(path.read_text())
        text = json.dumps({**facts, text: float("nan") if text == "created" else 7})
    path.write_text(text)
    with Store(tmp_path / "s") as store:
        assert [job.id for job in store.jobs()] == [whole.id]
    assert path.read_text() == text


@pytest.mark.parametrize("name", PATHS)
def test_nothing_but_an_id_is_part_of_a_path(tmp_path: Path, name: str):
    with Store(tmp_path / "s") as store:
        for asked in (store.job, store.place, store.remove):
            with pytest.raises(Refused) as refused:
                asked(name)
            assert refused.value.status == 404


def test_one_that_is_removed_is_gone(tmp_path: Path):
    with Store(tmp_path / "s") as store:
        job = add(store)
        with pytest.raises(Refused, match="cancel it first"):
            store.remove(job.id)
        store.change(job.id, state=DONE)
        store.remove(job.id)
        assert not store.jobs()
        with pytest.raises(Refused, match="no job"):
            store.job(job.id)
    assert not files(tmp_path)


@pytest.mark.parametrize("made", ["file", "file above", "job that is a link"])
def test_places_that_are_not_ours(tmp_path: Path, made: str):
    folder = tmp_path / "s"
    if made == "job that is a link":
        other = tmp_path / "other"
        other.mkdir()
        (other / "job.json").write_text(json.dumps(Job(id=(name := new_id()), created=1.0, settings={}).kept()))
        (folder / "jobs").mkdir(parents=True)
        (folder / "jobs" / name).symlink_to(other)
        with Store(folder) as store:
            assert not store.jobs()
        return
    (folder if made == "file" else tmp_path / "t").write_text("")
    with pytest.raises(InputError, match="no folder"), Store(folder if made == "file" else tmp_path / "t" / "s"):
        pass
