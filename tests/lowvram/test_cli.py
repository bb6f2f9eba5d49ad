"""The command line as a person meets it: exit codes, one-line errors, nothing half-written."""

from __future__ import annotations

import json
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from lowvram.cli import main
from lowvram.media.samples import synth_voice, write_wav
from lowvram.media.video import probe
from lowvram_kernels import choices


def run(*args) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def infer_args(tiny, out: Path, **changes) -> list:
    options = {
        "model": tiny.artifact("int8"), "image": tiny.portrait, "audio": tiny.voice, "prompt": "A person speaks",
        "out": out, "size": "128*128", "infer_frames": 16, "sample_steps": 1, "device": "cpu",
    }  # fmt: skip
    return ["infer", "--quiet", *(word for name, value in (options | changes).items() for word in (f"--{name}", value))]


def one_line(result: Result, *parts: str) -> None:
    lines = [line for line in result.stderr.splitlines() if line.startswith("lowvram: error: ")]
    assert result.exit_code == 2, result.output
    assert len(lines) == 1
    assert "Traceback" not in result.output
    assert all(part in lines[0] for part in parts), lines[0]


def test_a_video_with_sound_and_a_report(tiny, tmp_path):
    out, report = tmp_path / "a.mp4", tmp_path / "a.json"
    choices.switch_off("norm_rope", choices.TRITON, torch.device("cuda", 0), "returned NaN")
    result = run(*infer_args(tiny, out), "--report", report)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    found = probe(out)
    facts = json.loads(report.read_text())
    # 1.5 s of voice: three clips of 16 frames begin in it, and the video ends with the sound.
    assert facts["frames"] == 3 * 16 - 3
    assert found["frames"] == facts["frames_written"] == 38
    assert (found["width"], found["height"], found["fps"], found["has_audio"]) == (128, 128, 25, True)
    assert found["audio_duration_s"] == pytest.approx(1.5, abs=0.1)
    assert {s["name"] for s in facts["stages"]} >= {"encode_text", "encode_audio", "encode_image", "denoise", "decode"}
    assert all(s["seconds"] >= 0 and s["peak_bytes"] > 0 for s in facts["stages"])
    assert facts["settings"]["base_seed"] == 420
    off = [note["operation"] for note in facts["kernel_choices"] if note["reason"] == "returned NaN"]
    assert off == ["norm_rope"]
    assert sorted(tmp_path.iterdir()) == [report, out]


def test_both_spellings_of_an_option(tiny, tmp_path):
    args = infer_args(tiny, tmp_path / "a.mp4", num_clip=1)
    args += ["--base-seed", "7", "--enable-online-decode", "--offload_model", "True", "--sample_solver", "euler"]
    assert run(*args).exit_code == 0


@pytest.mark.parametrize(
    ("name", "make", "parts"),
    [
        ("audio", lambda p: None, ["gone"]),
        ("audio", lambda p: p.write_text("no sound"), ["expected WAV"]),
        ("audio", lambda p: write_wav(p, np.zeros(16000, np.float32), 16000), ["silent"]),
        ("audio", lambda p: wave_of(p, 0), ["empty"]),
        ("audio", lambda p: write_wav(p, synth_voice(0.4), 16000), ["0.4", "0.48"]),
        ("image", lambda p: None, ["gone"]),
        ("image", lambda p: p.write_bytes(b"GIF89a nothing"), ["gone"]),
        ("image", lambda p: Image.new("RGB", (1, 1)).save(p, "png"), ["1"]),
        ("image", lambda p: Image.new("1", (10000, 10000)).save(p, "png"), ["10000"]),
    ],
)  # fmt: skip
def test_bad_files(tiny, tmp_path, name, make, parts):
    bad = tmp_path / "gone"
    make(bad)
    result = run(*infer_args(tiny, tmp_path / "a.mp4", **{name: bad}))
    one_line(result, *parts)
    assert not list(tmp_path.glob("*.mp4"))


def wave_of(path: Path, samples: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(2 * samples))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"size": "huge"}, ["huge", "704*384"]),
        ({"size": "0*128"}, ["0*128"]),
        ({"infer_frames": 14}, ["14", "multiple of 4"]),
        ({"cond-rope-distance": "near"}, ["near"]),
        ({"device": "cuda:7"}, ["cuda:7"]),
        ({"dtype": "float8"}, ["float8"]),
    ],
)
def test_bad_settings(tiny, tmp_path, changes, parts):
    one_line(run(*infer_args(tiny, tmp_path / "a.mp4", **changes)), *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["nowhere/a.mp4", "a.avi", "."])
def test_bad_places_to_write(tiny, tmp_path, out):
    one_line(run(*infer_args(tiny, tmp_path / out)))
    assert not list(tmp_path.iterdir())


def test_a_changed_byte_is_found_by_verify(tiny, tmp_path):
    model = shutil.copytree(tiny.artifact("int8"), tmp_path / "model")
    with (model / "dit.safetensors").open("r+b") as file:
        file.seek(-5000, 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    one_line(run(*infer_args(tiny, tmp_path / "a.mp4", model=model), "--verify"), "dit.safetensors")
    one_line(run("inspect", model, "--verify"), "dit.safetensors")


def test_an_artifact_of_another_version(tiny, tmp_path):
    model = shutil.copytree(tiny.artifact("int8"), tmp_path / "model")
    manifest = json.loads((model / "manifest.json").read_text())
    (model / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    one_line(run(*infer_args(tiny, tmp_path / "a.mp4", model=model)), "99")


def test_a_folder_that_is_no_artifact(tiny, tmp_path):
    one_line(run(*infer_args(tiny, tmp_path / "a.mp4", model=tmp_path)), "manifest.json")


def test_inspect_prints_what_is_there(tiny):
    result = run("inspect", tiny.artifact("int8"))
    assert result.exit_code == 0, result.output
    assert all(word in result.stdout for word in ("dit", "vae", "text_encoder", "int8"))
    assert json.loads(run("inspect", tiny.artifact("int8"), "--json").stdout)


def test_convert_errors_reach_the_command_line(tiny, tmp_path):
    one_line(run("convert", "--ckpt-dir", tmp_path / "none", "--out", tmp_path / "out"), "none")
    one_line(run("convert", "--ckpt-dir", tiny.checkpoint, "--out", tmp_path / "no" / "out"), "no")
    assert not (tmp_path / "out").exists()


def test_compare_runs_both_itself(tiny, tmp_path):
    args = ["compare", "--model", tiny.artifact("int8"), "--baseline", tiny.artifact("fp32")]
    args += ["--image", tiny.portrait, "--audio", tiny.voice, "--prompt", "A person speaks", "--out-dir", tmp_path]
    args += ["--size", "128*128", "--infer_frames", 12, "--num_clip", 1, "--sample_steps", 1, "--device", "cpu"]
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert 0 < facts["values"]["velocity_error"] < 0.1
    assert facts["teacher_forced"]["blocks"] == facts["teacher_forced"]["of_blocks"] == 1
    assert len(facts["teacher_forced"]["layers"]) == 5
    assert (tmp_path / "model.mp4").exists()
    again = run("compare", tmp_path / "model.json", tmp_path / "baseline.json", "--fail-under", "psnr=99")
    assert again.exit_code == 1
    assert run("compare", tmp_path / "model.mp4", tmp_path / "model.mp4", "--fail-under", "psnr=99").exit_code == 0


def test_compare_wants_two_files_or_two_models(tiny):
    assert run("compare", "a.json").exit_code == 2
    refused = run("compare", "a.json", "b.json", "--kv", "int8", "--baseline_kv", "bf16")
    assert refused.exit_code == 2
    assert "--baseline-kv, --kv have an effect with --model" in refused.output
    assert run("compare", "--model", tiny.artifact("int8")).exit_code == 2
