"""Lists of jobs as people write them, and what is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowvram.batch.lists import read_list
from lowvram.media.several import names_of
from lowvram_kernels.errors import InputError

KNOWN = frozenset(("image", "audio", "prompt", "out", "size", "base_seed", "sample_steps", "num_clip"))
TWO = [{"image": "a.png", "audio": "a.wav", "prompt": "one"}, {"image": "b.png", "audio": "b.wav", "prompt": "two"}]
LISTS = {
    "list.json": json.dumps(TWO),
    "names.json": json.dumps({"first": TWO[0], "second": TWO[1]}),
    "names.yaml": "first:\n  image: a.png\n  audio: a.wav\n  prompt: one\n"
    "second: {image: b.png, audio: b.wav, prompt: two}",
    "list.yml": "- {image: a.png, audio: a.wav, prompt: one}\n- {image: b.png, audio: b.wav, prompt: two}\n",
    "comma.csv": "image,audio,prompt\na.png,a.wav,one\n\nb.png,b.wav,two\n",
    "semicolon.csv": "\ufeffimage;audio;prompt\r\na.png;a.wav;one\r\nb.png;b.wav;two\r\n",
    "tab.tsv": "image\taudio\tprompt\na.png\ta.wav\tone\nb.png\tb.wav\ttwo",
    "spelling.csv": "--Image,AUDIO,prompt,comment\na.png,a.wav,one,mine\nb.png,b.wav,two,\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_two_jobs_in_every_spelling(tmp_path, name):
    (tmp_path / name).write_text(LISTS[name], encoding="utf-8", newline="")
    found = read_list(tmp_path / name, KNOWN)
    assert [job.place for job in found] == [1, 2]
    assert [job.name for job in found] == (["first", "second"] if name.startswith("names") else ["", ""])
    assert [job.wrong for job in found] == ["", ""]
    expected = [job | {kind: tmp_path / job[kind] for kind in ("image", "audio")} for job in TWO]
    assert [job.settings for job in found] == expected


SEVERAL = {
    "voices": ({"audio": "a.wav+b.wav"}, {"audio": ["a.wav", "b.wav"]}),
    "in folders": ({"audio": "in+side/a.wav+b.wav"}, {"audio": ["in+side/a.wav", "b.wav"]}),
    "portraits": ({"image": "a.png+in+side/c.png"}, {"image": ["a.png", "in+side/c.png"]}),
    "a name with a plus": ({"image": "rock+roll.png"}, {"image": ["rock+roll.png"]}),
    "both kinds": ({"image": "rock+roll.png+a.png"}, {"image": ["rock+roll.png", "a.png"]}),
    "gone": ({"audio": "a.wav+gone.wav"}, {"audio": ["a.wav", "gone.wav"]}),
    "masks": ({"masks": ["a.png", "rock+roll.png"]}, {"masks": ["a.png", "rock+roll.png"]}),
    "masks in a cell": ({"mask": "a.png+rock+roll.png"}, {"masks": ["a.png", "rock+roll.png"]}),
    "a mask": ({"mask": "a.png"}, {"masks": ["a.png"]}),
    "poses": ({"pose_video": "p.mp4"}, {"pose_video": ["p.mp4"]}),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_several_files_are_found_one_by_one(tmp_path, case):
    entry, expected = SEVERAL[case]
    (tmp_path / "in+side").mkdir()
    for name in ("a.wav", "b.wav", "in+side/a.wav", "a.png", "in+side/c.png", "rock+roll.png", "p.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    (job,) = read_list(tmp_path / "list.json", KNOWN | {"masks", "pose_video"})
    assert job.wrong == ""
    ((name, value),) = job.settings.items()
    found = value if isinstance(value, list) else names_of(value)
    assert {name: list(found)} == {key: [tmp_path / each for each in names] for key, names in expected.items()}


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("a.json", "", "is no JSON"),
        ("a.json", "[", "is no JSON"),
        ("a.json", "3", "holds int"),
        ("a.json", "[]", "no job"),
        ("a.json", "{}", "no job"),
        ("a.json", "[" * 100_000, "is no JSON"),
        ("a.json", '{"a": {}, "a": {}}', "'a' stands twice"),
        ("a.json", '[{"seed": 1, "seed": 2}]', "'seed' stands twice"),
        ("a.yaml", "a: {}\na: {}\n", "'a' stands twice"),
        ("a.yaml", "a: [", "is no YAML"),
        ("a.yaml", "? [1]\n: 2\n", "is no YAML"),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "is no YAML"),
        ("a.csv", "", "no job"),
        ("a.csv", "image,audio\n", "no job"),
        ("a.csv", "image,image\na,b\n", "no two alike"),
        ("a.csv", "image,audio\na,b,c\n", "3 cells in row 2"),
        ("a.csv", 'image,audio\n"a,b\n', "is no CSV"),
        ("a.txt", "image audio", "expected .json, .csv"),
    ],
)
def test_what_is_no_list(tmp_path, name, text, part):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="expected") as caught:
        read_list(tmp_path / name, KNOWN)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.json").write_bytes('["für"]'.encode("latin-1"))
    (tmp_path / "folder.json").mkdir()
    for name, part in [("latin.json", "UTF-8"), ("folder.json", "no file"), ("gone.json", "no file")]:
        with pytest.raises(InputError, match=part):
            read_list(tmp_path / name, KNOWN)


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"image": "a.png", "negative": "x"}, "the setting 'negative'"),
        ({"seed": 1, "base_seed": 2}, "base_seed twice"),
        ({"base-seed": 1, "base_seed": 2}, "base_seed twice"),
        ("a.png", "is str"),
        (["a.png", "a.wav"], "is list"),
        (None, "is NoneType"),
    ],
)
def test_an_entry_that_is_wrong_leaves_the_others(tmp_path, entry, part):
    (tmp_path / "a.json").write_text(json.dumps([entry, TWO[0]]))
    wrong, right = read_list(tmp_path / "a.json", KNOWN)
    assert part in wrong.wrong
    assert right.wrong == ""


def test_paths_from_the_list_or_as_the_reference_has_them(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "lowvram.plan")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "here.png").touch()
    (tmp_path / "lists" / "said.txt").write_text("prompt")
    (tmp_path / "there.wav").touch()
    entry = {"image": "here.png", "audio": "there.wav", "prompt": "@said.txt"}
    (tmp_path / "lists" / "a.json").write_text(json.dumps([entry, {"prompt": "said.txt"}, {"prompt": "word " * 1000}]))
    monkeypatch.chdir(tmp_path)
    first, second, third = read_list(Path("lists/a.json"), KNOWN)
    assert first.settings == {
        "image": Path("lists/here.png"), "audio": tmp_path / "there.wav", "prompt": "@lists/said.txt",
    }  # fmt: skip
    assert second.settings["prompt"] == "@lists/said.txt"
    assert third.settings["prompt"] == "word " * 1000
    assert "there.wav is not in the list's folder" in caplog.text
