"""Recording a reference: where it can be, and what is left of one that fails."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowvram.compare import record as recording
from lowvram.compare.block_files import BlockRecorder
from lowvram.compare.trajectories import Trajectories
from lowvram.compare.vae_errors import Likeness
from lowvram.infer import Watching, infer
from lowvram.outputs import Outputs
from lowvram.pipeline import AvatarPipeline
from lowvram.recorder import Recorder
from lowvram_kernels.errors import ConfigError, InputError
from lowvram_quantize.claims import reading, writing
from tests.lowvram.compare.calls import RUNS, one_line, record, there

PLACES = {
    "a folder of mine": (lambda d: there(d / "out", "mine"), [], "holds files and is no reference"),
    "a folder of mine, overwritten": (lambda d: there(d / "out", "mine"), ["--overwrite"], "is no reference"),
    "a file": (lambda d: there(d, "out") / "out", ["--overwrite"], "is no folder"),
    "under a file": (lambda d: there(d, "out") / "out" / "ref", [], "is no folder"),
    "in a folder that is not there": (lambda d: d / "no" / "ref", [], "does not exist"),
    "a reference": (lambda d: there(d / "out", "reference.json"), [], "--overwrite"),
    "where nothing can be made": (lambda _d: Path("/proc/ref"), [], "/proc"),
    "too long a name": (lambda d: d / ("x" * 300), [], "too long"),
    "what somebody else began": (
        lambda d: there(d / "out.partial", "mine").with_name("out"),
        [],
        "out.partial is there",
    ),
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_place_that_a_reference_cannot_have(tiny, tmp_path, monkeypatch, kind):
    make, more, said = PLACES[kind]
    monkeypatch.setattr(recording, "infer", lambda *_a, **_m: pytest.fail("the work has begun"))
    place = make(tmp_path)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    one_line(record(tiny, place, *more, *RUNS), said)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("option", ["image", "audio", "prompt", "model"])
def test_it_is_none_of_what_is_read(tiny, tmp_path, no_run, option):
    there(tmp_path / "out", "reference.json")
    given = {"image": tiny.portrait, "audio": tiny.voice}
    if option == "model":
        one_line(record(tiny, tiny.artifact("fp32") / "ref", "--overwrite"), "inside --model")
        return
    mine = tmp_path / "out" / "mine"
    mine.write_bytes(b"x" if option == "prompt" else given[option].read_bytes())
    one_line(
        record(tiny, tmp_path / "out", "--overwrite", **{option: f"@{mine}" if option == "prompt" else mine}), option
    )
    assert mine.is_file()


def made(monkeypatch, then=lambda _outputs: None):
    """The run itself takes no time."""

    def infer(_pipeline, _request, outputs, **_more):
        outputs.video.write_bytes(b"new")
        then(outputs)
        return {"settings": {}}

    monkeypatch.setattr(recording, "infer", infer)
    monkeypatch.setattr(recording, "portrait_there_and_back", lambda *_a: Likeness(psnr=30.0, ssim=0.9))


def test_what_is_replaced_goes_when_the_new_one_is_whole(tiny, tmp_path, monkeypatch):
    out = there(tmp_path / "out", "reference.json", "old")
    seen = []
    made(monkeypatch, lambda _outputs: seen.append((out / "old").read_bytes()))
    there(tmp_path / "out.partial", "unfinished", "of one that was killed")
    with reading(out / "reference.json"):
        one_line(record(tiny, out, "--overwrite", *RUNS), "in use")
    with writing(out, "lowvram compare record"):
        one_line(record(tiny, out, "--overwrite", *RUNS), f"process {os.getpid()}")
    done = record(tiny, out, "--overwrite", *RUNS)
    assert done.exit_code == 0, (done.output, done.exception)
    assert seen == [b"mine"]
    assert sorted(path.name for path in out.iterdir()) == [
        "baseline.json", "baseline.mp4", "blocks", "portrait.png", "reference.json", "voice.wav"
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [InputError("NaN"), OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_recording_that_fails_leaves_what_was_there(tiny, tmp_path, monkeypatch, error):
    out = there(tmp_path / "out", "reference.json", "old")

    def fail(_outputs):
        raise error

    made(monkeypatch, fail)
    assert record(tiny, out, "--overwrite", *RUNS).exit_code != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["old", "reference.json"]


@pytest.mark.parametrize("at", ["checksums", "reference.json", "the other name", "its name"])
@pytest.mark.parametrize("there_before", [False, True])
def test_one_that_was_killed_makes_room_for_the_next(tiny, tmp_path, monkeypatch, at, there_before):
    """What lies there when the process goes is what the next recording finds."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    if there_before:
        there(out, "reference.json", "old")
    made(monkeypatch)

    def killed(*_arguments):
        shutil.copytree(partial, tmp_path / "left")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if at == "checksums":
            patched.setattr(recording, "sha256_file", killed)
        elif at == "reference.json":
            patched.setattr(recording, "write_json", lambda path, _facts: path.name != "reference.json" or killed())
        elif at == "the other name":
            patched.setattr(recording, "_put", killed)
        else:
            patched.setattr(Path, "rename", killed)
        assert record(tiny, out, *RUNS, *["--overwrite"] * there_before).exit_code != 0
    (tmp_path / "left").rename(partial)
    done = record(tiny, out, *RUNS, *["--overwrite"] * there_before)
    assert done.exit_code == 0, (done.output, done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {*json.loads((out / "reference.json").read_text())["files"], "reference.json"}


KEPT = {"recorder": Recorder, "kept": Path("blocks")}


@pytest.mark.parametrize("missing", KEPT)
def test_a_recorder_and_its_folder_come_together(missing):
    with pytest.raises(ConfigError, match=f"no {missing}; expected both"):
        Watching(**{name: value for name, value in KEPT.items() if name != missing})
    assert Watching(**KEPT).begun is None


def test_of_two_recorders_none_is_left_out_silently(tiny, tmp_path):
    pipeline = AvatarPipeline.from_artifact(tiny.artifact("fp32"), device="cpu")
    outputs = Outputs(video=tmp_path / "a.mp4", dump_tensors=tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"a\.safetensors, and watching\.recorder keeps tensors in blocks"):
        infer(pipeline, tiny.request(), outputs, watching=Watching(**KEPT))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_frames_of_nan_are_not_kept(tmp_path, value):
    frames = torch.zeros(3, 2, 16, 16)
    recorder = BlockRecorder(tmp_path)
    recorder.decoded(frames)
    frames[1, 1, 3, 4] = value
    with pytest.raises(InputError, match="frames of block 1 hold NaN or infinity"):
        recorder.decoded(frames)
    assert [path.name for path in tmp_path.iterdir()] == ["frames-00000.safetensors"]


@pytest.mark.parametrize("wrong", ["velocity", "latent", "infinity", "both", "the last step only"])
def test_a_baseline_of_nan_is_not_recorded(wrong):
    trajectories, block = Trajectories(), SimpleNamespace(index=0)
    rollout = SimpleNamespace(steps=range(2))
    trajectories.watcher().begun(rollout, 1)
    bad = torch.full((4, 1, 2, 2), float("inf") if wrong == "infinity" else float("nan"))
    good = torch.ones(4, 1, 2, 2)
    for step in range(2):
        rollout.on_latent(block, step, good)
        last = wrong != "the last step only" or step == 1
        rollout.on_prediction(block, step, bad if wrong != "latent" and last else good)
    with pytest.raises(InputError, match="block 0 of the baseline holds NaN or infinity"):
        rollout.on_latent(block, 2, bad if wrong in ("latent", "both") else good)
    assert not trajectories.kept


@pytest.mark.parametrize(
    "more",
    [
        {"pose_video": Path("pose.mp4")},
        {"masks": (Path("a.png"),)},
        {"audio": Path("gone-a.wav+gone-b.wav")},
        {"image": Path("gone-a.png+gone-b.png")},
        {"audio": Path("gone-a.wav+gone-b.wav"), "masks": (Path("a.png"), Path("b.png"))},
    ],
)
def test_other_people_and_poses_are_not_recorded(tiny, tmp_path, more):
    pipeline = AvatarPipeline.from_artifact(tiny.artifact("int8"), device="cpu")
    with pytest.raises(ConfigError, match="one portrait and one voice"):
        recording.record_reference(pipeline, tiny.request(**more), tmp_path / "ref")
    assert not list(tmp_path.iterdir())
