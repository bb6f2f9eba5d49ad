"""What a run may write where: nothing is destroyed, and what cannot be written is said before the work."""

from __future__ import annotations

import json
import logging
import os
import shutil

import pytest
from click.testing import CliRunner
from safetensors import SafetensorError

from lowvram.cli import main
from lowvram.infer import infer
from lowvram.outputs import Outputs
from lowvram.pipeline import AvatarPipeline
from lowvram_kernels.errors import CheckpointError, InputError, OutputError
from lowvram_quantize.claims import lock_file, writing


@pytest.fixture
def inputs(tmp_path):
    found = {"--image": tmp_path / "portrait.png", "--audio": tmp_path / "voice.mp4", "--model": tmp_path / "model"}
    found["--image"].write_bytes(b"portrait")
    found["--audio"].write_bytes(b"voice")
    found["--model"].mkdir()
    return found


def clash(tmp_path, kind: str) -> Outputs:
    video = tmp_path / "out.mp4"
    match kind:
        case "audio":
            return Outputs(video=tmp_path / "voice.mp4", overwrite=True)
        case "audio through dots":
            return Outputs(video=tmp_path / "model" / ".." / "voice.mp4", overwrite=True)
        case "audio through a link":
            video.symlink_to(tmp_path / "voice.mp4")
            return Outputs(video=video, overwrite=True)
        case "audio through a hard link":
            os.link(tmp_path / "voice.mp4", video)
            return Outputs(video=video, overwrite=True)
        case "report is the video":
            return Outputs(video=video, report=video)
        case "dump is the video":
            return Outputs(video=video, dump_tensors=tmp_path / "." / "out.mp4")
        case "dump is the report":
            return Outputs(video=video, dump_tensors=tmp_path / "x", report=tmp_path / "x")
        case "report is the image":
            return Outputs(video=video, report=tmp_path / "portrait.png", overwrite=True)
        case "report is the unfinished video":
            return Outputs(video=video, report=tmp_path / "out.partial.mp4")
        case "inside the artifact":
            return Outputs(video=tmp_path / "model" / "out.mp4")
    raise AssertionError(kind)


CLASHES = (
    "audio", "audio through dots", "audio through a link", "audio through a hard link", "report is the video",
    "dump is the video", "dump is the report", "report is the image", "report is the unfinished video",
    "inside the artifact",
)  # fmt: skip


@pytest.mark.parametrize("kind", CLASHES)
def test_one_place_for_two_things_is_refused(tmp_path, inputs, kind):
    with pytest.raises(InputError, match=r"name another file|in another folder"):
        clash(tmp_path, kind).check(inputs)
    assert (tmp_path / "voice.mp4").read_bytes() == b"voice"


@pytest.mark.parametrize("option", ["video", "report", "dump_tensors"])
def test_what_is_there_is_replaced_only_when_told(tmp_path, option):
    names = {"video": "out.mp4", "report": "out.json", "dump_tensors": "out.safetensors"}
    (tmp_path / names[option]).write_bytes(b"old")
    places = {name: tmp_path / file for name, file in names.items()}
    with pytest.raises(InputError, match=r"there already.*--overwrite"):
        Outputs(**places).check()
    Outputs(**places, overwrite=True).check()


@pytest.mark.parametrize("option", ["video", "report", "dump_tensors"])
def test_a_folder_that_takes_nothing_is_said_at_the_start(tmp_path, monkeypatch, option):
    import lowvram_quantize.places as module

    def full(dir) -> None:
        raise OSError(30, "Read-only file system")

    places = {"video": tmp_path / "out.mp4"} | ({} if option == "video" else {option: tmp_path / "other"})
    monkeypatch.setattr(module.tempfile, "TemporaryFile", full)
    with pytest.raises(OutputError, match="Read-only file system"):
        Outputs(**places).check()


@pytest.mark.parametrize("name", ["missing/out.mp4", "folder.mp4"])
def test_no_place_for_a_file(tmp_path, name):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(InputError, match=r"does not exist|a folder"):
        Outputs(video=tmp_path / name).check()


def test_no_ordinary_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(InputError, match="no ordinary file"):
        Outputs(video=tmp_path / "pipe.mp4", overwrite=True).check()


def test_an_unfinished_video_of_before_is_kept(tmp_path, caplog):
    outputs = Outputs(video=tmp_path / "out.mp4")
    for content in (b"first", b"second"):
        outputs.partial.write_bytes(content)
        with caplog.at_level(logging.WARNING), outputs.claimed():
            assert not outputs.partial.exists()
    assert (tmp_path / "out.partial.1.mp4").read_bytes() == b"first"
    assert (tmp_path / "out.partial.2.mp4").read_bytes() == b"second"
    assert "out.partial.2.mp4" in caplog.text


def test_a_second_run_there_is_refused_and_disturbs_nothing(tmp_path):
    outputs = Outputs(video=tmp_path / "out.mp4", report=tmp_path / "out.json")
    with writing(tmp_path / "out.json", "lowvram infer"):
        outputs.partial.write_bytes(b"being written")
        with pytest.raises(InputError, match=f"process {os.getpid()}"), outputs.claimed():
            pass
        assert outputs.partial.read_bytes() == b"being written"
    assert not lock_file(tmp_path / "out.mp4").exists()


def arguments(tiny, out, **options: object) -> list[str]:
    settings = {"model": tiny.artifact("int8"), "image": tiny.portrait, "audio": tiny.voice, "prompt": "x", "out": out}
    settings |= {"size": "128*128", "infer_frames": 16, "num_clip": 1, "sample_steps": 1} | options
    return ["infer", "-q", *(f"--{name}={value}" for name, value in settings.items())]


def test_a_link_stays_and_its_target_is_written(tiny, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out.mp4").symlink_to(tmp_path / "disk" / "video.mp4")
    done = CliRunner().invoke(main, arguments(tiny, tmp_path / "out.mp4", report=tmp_path / "out.json"))
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out.mp4").is_symlink()
    assert (tmp_path / "disk" / "video.mp4").stat().st_size > 1000
    assert json.loads((tmp_path / "out.json").read_text())["frames_written"] > 0
    again = CliRunner().invoke(main, arguments(tiny, tmp_path / "out.mp4"))
    assert again.exit_code == 2
    assert "--overwrite" in again.output


@pytest.mark.parametrize("option", ["report", "dump_tensors"])
def test_a_full_disk_behind_the_video_is_one_line_and_the_video_stays(tiny, tmp_path, monkeypatch, option):
    import lowvram.recorder as module

    def full(*_args, **_more) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    (tmp_path / "report.partial").symlink_to("/dev/full")
    done = CliRunner().invoke(main, arguments(tiny, tmp_path / "out.mp4", **{option: tmp_path / option}))
    assert done.exit_code == 2, done.output
    assert "No space left" in done.output
    assert "Traceback" not in done.output
    assert (tmp_path / "out.mp4").stat().st_size > 1000


def test_an_artifact_that_was_replaced_since_it_was_opened_is_not_run(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.artifact("int8"), folder)
    pipeline = AvatarPipeline.from_artifact(folder, device="cpu")
    shutil.rmtree(folder)
    shutil.copytree(tiny.artifact("bf16"), folder)
    with pytest.raises(CheckpointError, match="was replaced"):
        infer(pipeline, tiny.request(), Outputs(video=tmp_path / "out.mp4"), quiet=True)
    assert not (tmp_path / "out.mp4").exists()
