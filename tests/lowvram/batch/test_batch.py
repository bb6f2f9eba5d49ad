"""Batches: good jobs made, bad ones explained, nothing twice; what is cut, changed or in the way."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import lowvram.batch.segmented as segmented
import lowvram.commands.batch as command_module
from lowvram.cli import main
from lowvram.media.samples import draw_portrait, synth_voice, write_wav
from lowvram.media.video import VideoWriter, probe
from lowvram.segments.files import SegmentFiles
from lowvram_quantize.claims import writing

SETTINGS = ("--device", "cpu", "--size", "128*128", "--infer-frames", "12", "--num-clip", "1", "--sample-steps", "1")


@pytest.fixture(autouse=True)
def no_pipeline(request, monkeypatch) -> None:
    """Nothing is opened where nothing is made with it."""
    if "made" in request.fixturenames:
        monkeypatch.setattr(command_module, "open_pipeline", lambda options, resident: None)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    draw_portrait(128, 128).save(folder / "a.png")
    draw_portrait(96, 128).save(folder / "b.png")
    write_wav(folder / "a.wav", synth_voice(1.0), 16000)
    write_wav(folder / "b.wav", synth_voice(1.2), 16000)
    write_wav(folder / "silent.wav", np.zeros(16000, np.float32), 16000)
    return folder


def job(files: Path, **changes) -> dict:
    return {"image": str(files / "a.png"), "audio": str(files / "a.wav"), "prompt": "A person speaks"} | changes


def write_list(folder: Path, jobs, name: str = "jobs.json") -> Path:
    (folder / name).write_text(json.dumps(jobs))
    return folder / name


def batch(tiny, path: Path, out: Path, *more) -> Result:
    arguments = ["batch", path, "--model", tiny.artifact("int8"), "--out-dir", out, *SETTINGS, "-q", *more]
    return CliRunner().invoke(main, [str(each) for each in arguments])


def results(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["jobs"]


def states(out: Path) -> list[str]:
    return [each["state"] for each in results(out)]


def test_twenty_with_three_bad_ones(tiny, files, tmp_path, made):
    bad = {3: {"image": "gone.png"}, 9: {"audio": str(files / "silent.wav")}, 15: {"size": "huge"}}
    jobs = [job(files, seed=place) | bad.get(place, {}) for place in range(20)]
    path, out = write_list(tmp_path, jobs), tmp_path / "out"
    done = batch(tiny, path, out)
    assert done.exit_code == 1, done.output
    assert len(made) == 17
    assert [place for place, state in enumerate(states(out)) if state == "refused"] == [3, 9, 15]
    assert "17 made, 3 refused" in done.stdout
    for words in ("job 4, gone_a: refused", "gone.png", "silent", "huge"):
        assert words in " ".join(done.stderr.split())
    videos = sorted(each.name for each in out.glob("*.mp4"))
    assert len(videos) == 17
    assert all((out / name).with_suffix(".json").is_file() for name in videos)
    before = {each: each.stat().st_mtime_ns for each in out.glob("*_*")}
    again = batch(tiny, path, out)
    assert again.exit_code == 1
    assert len(made) == 17
    assert "17 there, 3 refused" in again.stdout
    assert {each: each.stat().st_mtime_ns for each in out.glob("*_*")} == before
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == states(out)
    assert [row["frames"] for row in rows[:5]] == ["12", "12", "12", "", "12"]


def test_by_the_model(tiny, files, tmp_path):
    """Two videos of one process, and none the second time."""
    jobs = {"first": job(files), "second": job(files, image=str(files / "b.png"), steps=2)}
    path, out = write_list(tmp_path, jobs), tmp_path / "out"
    done = batch(tiny, path, out, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["counts"] == {"made": 2}
    assert sorted(each.name for each in out.iterdir()) == [
        "first.json", "first.mp4", "results.csv", "results.json", "second.json", "second.mp4",
    ]  # fmt: skip
    reports = [json.loads((out / f"{name}.json").read_text()) for name in ("first", "second")]
    assert [report["settings"]["sample_steps"] for report in reports] == [1, 2]
    assert all(probe(each["video"])["frames"] == each["frames"] for each in facts["jobs"])
    # The second reads no weights: they stayed, and its prompt is that of the first.
    assert [report["memory"]["weight_bytes_read"] > 0 for report in reports] == [True, False]
    # One clip of 12 frames, the first 3 of which are not shown, of a voice of a second.
    assert [report["voice_cut"] for report in reports] == [{"kept_s": 9 / 25, "lost_s": 1 - 9 / 25}] * 2
    assert all(report["frames_written"] == 9 for report in reports)
    assert "--num_clip 1 ends the video after 0.36 s" in " ".join(done.stderr.split())
    assert json.loads(batch(tiny, path, out, "--json").stdout)["counts"] == {"there": 2}


def test_one_that_was_cut_goes_on_in_segments(tiny, files, tmp_path, monkeypatch):
    """Interrupted behind its first segment, killed before its segments are joined, and one file in the end."""
    path, out = write_list(tmp_path, {"one": job(files, audio=str(tiny.voice), num_clip=3)}), tmp_path / "out"
    how = ("--segment-minutes", "0.01", "--infer-frames", "16")
    cut = SegmentFiles.cut

    def interrupted(self, *arguments):
        cut(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SegmentFiles, "cut", interrupted)
        assert batch(tiny, path, out, *how).exit_code == 1
    assert states(out) == ["cut"]
    changed = write_list(tmp_path, {"one": job(files, audio=str(tiny.voice), num_clip=3, seed=5)}, "changed.json")
    assert batch(tiny, changed, out, *how).exit_code == 1
    assert "not what it was" in results(out)[0]["reason"]
    with monkeypatch.context() as patch:
        patch.setattr(segmented, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert batch(tiny, path, out, *how).exit_code == 1
    assert len(list(out.glob("one-*.mp4"))) > 1
    done = batch(tiny, path, out, *how)
    assert done.exit_code == 0, done.output
    assert sorted(each.name for each in out.iterdir()) == ["one.json", "one.mp4", "results.csv", "results.json"]
    assert probe(out / "one.mp4")["frames"] == results(out)[0]["frames"] == 38
    assert probe(out / "one.mp4")["audio_duration_s"] == pytest.approx(1.5, abs=0.01)
    assert batch(tiny, path, out, *how).exit_code == 0
    assert states(out) == ["there"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--segment-minutes", "0"), "expected more than 0"),
        (("--segment-minutes", "nan"), "expected more than 0"),
        (("--segment-minutes", "5", "--allow-quality-loss"), "leave one out"),
    ],
)
def test_segments_that_cannot_be(tiny, files, tmp_path, made, more, words):
    done = batch(tiny, write_list(tmp_path, [job(files)]), tmp_path / "out", *more)
    assert done.exit_code == 2
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_references_sample_list(tiny, files, tmp_path, made):
    text = f"man:\n  prompt: A man\n  image: {files}/a.png\n  audio: {files}/a.wav\n  num_clip: 1\n"
    (tmp_path / "samples.yaml").write_text(text)
    arguments = ["batch", "--sample_list", tmp_path / "samples.yaml", "--save_dir", tmp_path / "out", "--model"]
    arguments += [tiny.artifact("int8"), *SETTINGS, "--start_from_ref", "--single_gpu"]
    assert CliRunner().invoke(main, [str(each) for each in arguments]).exit_code == 0
    assert made == ["man.mp4"]


def test_settings_of_the_command_line_are_for_those_that_have_none(tiny, files, tmp_path, made):
    (tmp_path / "jobs.csv").write_text("audio,prompt,steps\nb.wav,,\nb.wav,own,3\n")
    write_wav(tmp_path / "b.wav", synth_voice(1.0), 16000)
    out = tmp_path / "out"
    done = batch(tiny, tmp_path / "jobs.csv", out, "--image", files / "b.png", "--prompt", "all")
    assert done.exit_code == 0, done.output
    found = [json.loads((out / f"{name}.json").read_text())["job"] for name in ("b_b", "b_b_2")]
    assert [(each["prompt"], each["sample_steps"]) for each in found] == [("all", 1), ("own", 3)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": "gone.png"}, "gone.png"),
        ({"audio": "gone.wav"}, "gone.wav"),
        ({"image": ""}, "image is"),
        ({"image": 3}, "3"),
        ({"audio": "a.wav+b.wav"}, "a.wav cannot be read"),
        ({"prompt": "@gone.txt"}, "gone.txt is no file"),
        ({"prompt": ["a"]}, "prompt is ['a']; expected text"),
        ({"steps": 0}, "--sample_steps is 0"),
        ({"steps": 2.5}, "sample_steps is 2.5; expected a whole number"),
        ({"steps": True}, "sample_steps is True; expected a whole number"),
        ({"seed": "x"}, "base_seed is 'x'; expected a whole number"),
        ({"infer_frames": 13}, "multiple of 4"),
        ({"audio_start": "later"}, "later"),
        ({"audio_start": 60}, "60"),
        ({"upscale": "maybe"}, "upscale is 'maybe'; expected true or false"),
        ({"sample_solver": "unipc"}, "expected euler"),
        ({"out": "a.avi"}, "expected a name that ends in .mp4"),
        ({"out": "jobs.json/a.mp4"}, "jobs.json"),
        ({"out": "results.mp4"}, "results.json too"),
        ({"out": "good.mp4"}, "what job 1 writes too"),
        ({"out": "GOOD.MP4"}, "what job 1 writes too"),
        ({"guidance": 3}, "the setting 'guidance'"),
        ({"image": "jobs.json"}, "jobs.json"),
    ],
)
def test_a_bad_job_is_explained_and_the_others_made(tiny, files, tmp_path, made, changes, words):
    path = write_list(tmp_path, [job(files, out="good.mp4"), job(files) | changes, job(files, seed=-1)])
    done = batch(tiny, path, tmp_path)
    assert done.exit_code == 1, done.output
    assert states(tmp_path) == ["made", "refused", "made"]
    assert words in results(tmp_path)[1]["reason"]
    assert not list(tmp_path.glob("*.avi"))
    assert json.loads(path.read_text())[1] == job(files) | changes  # the list is as it was


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "no JSON"), ("[]", "no job"), ("[3", "no JSON"), ('"a"', "holds str"), (None, "no file")],
)
def test_a_list_that_is_none(tiny, tmp_path, made, text, words):
    if text is not None:
        (tmp_path / "jobs.json").write_text(text)
    done = batch(tiny, tmp_path / "jobs.json", tmp_path / "out")
    assert done.exit_code == 2
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_commands_that_name_no_list_or_two(tiny, files, tmp_path, made):
    path = write_list(tmp_path, [job(files)])
    assert "no list of jobs, or two" in batch(tiny, path, tmp_path, "--sample_list", path).stderr
    arguments = ["batch", "--model", str(tiny.artifact("int8")), "--out-dir", str(tmp_path)]
    assert CliRunner().invoke(main, arguments).exit_code == 2
    assert batch(tiny, path, path).exit_code == 2  # the folder is a file
    assert not made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "Another"}, "another prompt"),
        ({"seed": 7}, "another base_seed"),
        ({"steps": 2}, "another sample_steps"),
        ({"size": "256*256"}, "another size"),
        ({"image": "b.png"}, "another image"),
        ({"audio": "b.wav", "num_clip": 2}, "another audio, num_clip"),
    ],
)
def test_what_has_changed_is_said_and_made_again_when_told(tiny, files, tmp_path, made, changes, words):
    def with_files(entry: dict) -> dict:
        return entry | {kind: str(files / entry[kind]) for kind in ("image", "audio") if kind in entry}

    out = tmp_path / "out"
    assert batch(tiny, write_list(tmp_path, {"one": job(files)}), out).exit_code == 0
    before = (out / "one.mp4").stat().st_mtime_ns
    path = write_list(tmp_path, {"one": job(files) | with_files(changes)})
    done = batch(tiny, path, out)
    assert (done.exit_code, states(out)) == (1, ["changed"])
    assert words in results(out)[0]["reason"]
    assert (out / "one.mp4").stat().st_mtime_ns == before
    assert batch(tiny, path, out, "--overwrite").exit_code == 0
    assert states(out) == ["made"]
    assert batch(tiny, path, out, "--overwrite").exit_code == 0
    assert states(out) == ["there"]
    assert len(made) == 2


def test_inputs_that_change_under_their_name_and_those_that_move(tiny, files, tmp_path, made):
    portrait, out = tmp_path / "p.png", tmp_path / "out"
    portrait.write_bytes((files / "a.png").read_bytes())
    path = write_list(tmp_path, {"one": job(files, image="p.png")})
    assert batch(tiny, path, out).exit_code == 0
    portrait.rename(tmp_path / "q.png")
    assert batch(tiny, write_list(tmp_path, {"one": job(files, image="q.png")}), out).exit_code == 0
    assert states(out) == ["there"]
    (tmp_path / "q.png").write_bytes((files / "b.png").read_bytes())
    assert batch(tiny, path.rename(tmp_path / "again.json"), out).exit_code == 1
    assert "another image" in results(out)[0]["reason"]


def test_a_list_that_is_mended_and_grows(tiny, files, tmp_path, made):
    """Jobs without names: what is made stays where it is, wherever its job stands now."""
    out, jobs = tmp_path / "out", [job(files, seed=seed) for seed in range(4)]
    jobs[1]["image"] = "gone.png"
    assert batch(tiny, write_list(tmp_path, jobs), out).exit_code == 1
    assert made == ["a_a.mp4", "a_a_2.mp4", "a_a_3.mp4"]
    before = {each["video"]: each["place"] for each in results(out) if each["state"] == "made"}
    jobs[1]["image"] = str(files / "a.png")
    mended = [job(files, seed=9), *reversed(jobs)]
    done = batch(tiny, write_list(tmp_path, mended), out)
    assert done.exit_code == 0, done.output
    assert states(out) == ["made", "there", "there", "made", "there"]
    assert made[3:] == ["a_a_4.mp4", "a_a_5.mp4"]
    assert {each["video"] for each in results(out) if each["state"] == "there"} == set(before)
    twice = batch(tiny, write_list(tmp_path, [jobs[0], jobs[0]]), out)
    assert twice.exit_code == 1  # the second would be a_a_2, where another is
    assert states(out) == ["there", "changed"]


def test_any_seed_will_do(tiny, files, tmp_path, made):
    path, out = write_list(tmp_path, {"one": job(files, seed=-1)}), tmp_path / "out"
    assert batch(tiny, path, out).exit_code == 0
    assert batch(tiny, path, out).exit_code == 0
    assert len(made) == 1
    path = write_list(tmp_path, [job(files, seed=-1), job(files, seed=-1)])
    for _ in range(2):  # of two, both are made, and known again
        assert batch(tiny, path, out).exit_code == 0
    assert made == ["one.mp4", "a_a.mp4"]


@pytest.mark.parametrize("damage", ["gone", "cut", "other", "no report"])
def test_a_video_that_is_not_what_its_report_says(tiny, files, tmp_path, made, damage):
    path, out = write_list(tmp_path, {"one": job(files)}), tmp_path / "out"
    batch(tiny, path, out)
    video = out / "one.mp4"
    if damage == "gone":
        video.unlink()
    elif damage == "cut":
        video.write_bytes(video.read_bytes()[:100])
    elif damage == "other":
        with VideoWriter(video, 64, 64) as writer:
            writer.write(np.zeros((3, 64, 64, 3), np.uint8))
    else:
        (out / "one.json").unlink()
    done = batch(tiny, path, out)
    expected = "made" if damage == "gone" else "changed"
    assert states(out) == [expected], done.output
    assert (expected == "made") == (done.exit_code == 0)
    assert batch(tiny, path, out, "--overwrite").exit_code == 0


def test_a_job_that_fails_leaves_the_others(tiny, files, tmp_path, made):
    jobs = {name: job(files, prompt=name) for name in ("one", "fail", "crash", "two")}
    done = batch(tiny, write_list(tmp_path, jobs), tmp_path / "out")
    assert done.exit_code == 1
    assert states(tmp_path / "out") == ["made", "failed", "failed", "made"]
    assert [each["reason"] for each in results(tmp_path / "out")] == [
        "", "it does not fit", "ValueError: nobody expected this", "",
    ]  # fmt: skip
    assert "Traceback" not in done.stdout


def test_interrupted_and_run_again(tiny, files, tmp_path, made):
    out = tmp_path / "out"
    jobs = {name: job(files, prompt=name) for name in ("one", "stop", "two")}
    assert batch(tiny, write_list(tmp_path, jobs), out).exit_code == 1
    assert states(out) == ["made", "cut", "waiting"]
    jobs["stop"]["prompt"] = "go on"
    done = batch(tiny, write_list(tmp_path, jobs), out)
    assert done.exit_code == 0, done.output
    assert states(out) == ["there", "made", "made"]
    assert made == ["one.mp4", "stop.mp4", "stop.mp4", "two.mp4"]


def test_killed_between_the_video_and_its_report(tiny, files, tmp_path, made):
    path, out = write_list(tmp_path, {"one": job(files)}), tmp_path / "out"
    batch(tiny, path, out)
    (out / "one.json").unlink()
    facts = json.loads((out / "results.json").read_text())
    facts["jobs"][0]["state"] = "under way"
    (out / "results.json").write_text(json.dumps(facts))
    assert batch(tiny, path, out).exit_code == 0
    assert made == ["one.mp4", "one.mp4"]


def test_files_of_others_stay(tiny, files, tmp_path, made):
    out = tmp_path / "out"
    out.mkdir()
    (out / "one.mp4").write_bytes(b"mine")
    path = write_list(tmp_path, {"one": job(files), "two": job(files, seed=2)})
    assert batch(tiny, path, out).exit_code == 1
    assert states(out) == ["changed", "made"]
    assert (out / "one.mp4").read_bytes() == b"mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "results.json").write_text("{}")
    refused = batch(tiny, path, other)
    assert refused.exit_code == 2
    assert "no results of lowvram batch" in refused.stderr
    assert (other / "results.json").read_text() == "{}"


def test_two_batches_in_one_folder(tiny, files, tmp_path, made):
    out = tmp_path / "out"
    out.mkdir()
    with writing(out / "results.json", "lowvram batch"):
        done = batch(tiny, write_list(tmp_path, [job(files)]), out)
    assert done.exit_code == 2
    assert "lowvram batch" in done.stderr
    assert not made


def test_names_are_files_everywhere(tiny, files, tmp_path, made):
    names = ["a/b", "..", "a\\b:c", "A/B", "ünï", "x" * 60]
    done = batch(
        tiny, write_list(tmp_path, {name: job(files, seed=n) for n, name in enumerate(names)}), tmp_path / "out"
    )
    assert done.exit_code == 0, done.output
    assert made == ["a_b.mp4", "job.mp4", "a_b_c.mp4", "A_B_2.mp4", "ünï.mp4", "x" * 60 + ".mp4"]
    assert all(each.parent == tmp_path / "out" for each in tmp_path.rglob("*.mp4"))


@pytest.fixture(scope="module")
def two(files) -> dict:
    """A job of two people that has all that one can have."""
    for name, box in (("left.png", (0, 0, 64, 128)), ("right.png", (64, 0, 128, 128))):
        mask = Image.new("L", (128, 128))
        mask.paste(255, box)
        mask.save(files / name)
    with VideoWriter(files / "poses.mp4", 64, 64) as writer:
        writer.write(np.full((8, 64, 64, 3), 90, np.uint8))
    return {"image": "a.png", "audio": "a.wav+b.wav", "masks": ["left.png", "right.png"], "pose_video": "poses.mp4",
            "prompt": "Two people speak"}  # fmt: skip


def in_files(files: Path, folder: Path, jobs) -> Path:
    """A list beside copies of the files."""
    shutil.copytree(files, folder)
    return write_list(folder, jobs)


@pytest.mark.parametrize("changed", ["a.png", "a.wav", "b.wav", "left.png", "right.png", "poses.mp4"])
def test_a_change_of_any_file_of_two_people_is_seen(tiny, files, two, tmp_path, made, changed):
    path, out = in_files(files, tmp_path / "c++", [two]), tmp_path / "out"
    assert batch(tiny, path, out).exit_code == 0
    assert made == ["a_a+b.mp4"]
    assert batch(tiny, path, out).exit_code == 0
    assert states(out) == ["there"]
    with (path.parent / changed).open("ab") as file:
        file.write(bytes(8))
    named = write_list(path.parent, {"a_a+b": two})
    assert batch(tiny, named, out).exit_code == 1
    assert states(out) == ["changed"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": "a.png+b.png"}, "give one of both"),
        ({"image": "a.png+b.png+a.png", "masks": None}, "3 portraits for 2 voices"),
        ({"audio": "a.wav"}, "there is one voice"),
        ({"masks": ["left.png"]}, "1 times for 2 voices"),
        ({"masks": 7}, "masks is 7; expected the paths of files"),
        ({"masks": ["left.png", 7]}, "masks is 7; expected the path of a file"),
        ({"mask": ["left.png"]}, "has masks twice"),
        ({"audio": "a.wav+gone.wav"}, "gone.wav"),
        ({"audio": "a.wav+silent.wav"}, "silent"),
        ({"pose_video": "a.wav"}, "pose video"),
        ({"out": "right.png"}, "ends in .mp4"),
    ],
    ids=str,
)
def test_two_people_that_cannot_be(tiny, files, two, tmp_path, made, change, reason):
    path, out = in_files(files, tmp_path / "in", [two | change, two]), tmp_path / "out"
    assert batch(tiny, path, out).exit_code == 1
    assert states(out) == ["refused", "made"]
    assert reason in results(out)[0]["reason"]


def test_no_job_writes_over_poses(tiny, files, two, tmp_path, made):
    path = in_files(files, tmp_path / "in", [two, two | {"out": "poses.mp4"}])
    assert batch(tiny, path, path.parent).exit_code == 1
    assert states(path.parent) == ["made", "refused"]
    assert "the pose video of job" in results(path.parent)[1]["reason"]


def test_records_of_one_person_are_as_they_were(tiny, files, tmp_path, made):
    out = tmp_path / "out"
    batch(tiny, write_list(tmp_path, {"one": job(files)}), out)
    record = json.loads((out / "one.json").read_text())["job"]
    assert {type(record[name]) for name in ("image_sha256", "audio_sha256")} == {str}
    assert not {"image", "audio", "masks", "masks_sha256", "pose_video", "pose_video_sha256"} & record.keys()


def test_two_people_of_the_command_line(tiny, files, tmp_path, made):
    path, out = write_list(tmp_path, [{"prompt": "They speak"}]), tmp_path / "out"
    both = [f"{files / f'a.{kind}'}+{files / f'b.{kind}'}" for kind in ("png", "wav")]
    done = batch(tiny, path, out, "--image", both[0], "--audio", both[1])
    assert done.exit_code == 0, done.output
    assert made == ["a+b_a+b.mp4"]
    refused = batch(tiny, path, out, "--pose_video", "p.mp4")
    assert refused.exit_code == 2
    assert "a job of the list has it" in refused.stderr
