"""A reference that was recorded once, and any artifact scored against it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import lowvram.commands.compare as command
from lowvram.compare import page, scoring
from lowvram.compare.record import _NOT_RECORDED
from lowvram.compare.reference import _KINDS, Reference
from lowvram.compare.same_model import check_model
from lowvram.request import Request
from lowvram_kernels.errors import InputError, OutOfMemoryError, OutputError
from lowvram_quantize.claims import replacing
from tests.lowvram.compare.calls import PROMPT, RUNS, one_line, run, score
from tests.lowvram.compare.test_page import Reader


def test_a_run_against_its_own_reference(tiny, reference, tmp_path):
    moved = shutil.copytree(reference, tmp_path / "elsewhere")
    bounds = [
        "psnr=99",
        "ssim=1",
        "velocity_error=0",
        "token_error_maximum=0",
        "teacher_forced_latent_error=0",
        "latent_error=0",
    ]
    done = score(moved, tiny.artifact("fp32"), "--json", *(f"--fail-under={bound}" for bound in bounds))
    assert done.exit_code == 0, (done.output, done.exception)
    facts = json.loads(done.stdout)
    assert facts["values"]["psnr"] == "inf"
    assert all(threshold["met"] for threshold in facts["thresholds"])
    assert facts["warnings"] == []
    assert {layer["relative_error"] for layer in facts["teacher_forced"]["layers"]} == {0}
    assert facts["identical_frames"] == len(facts["frames"]) == 29
    assert [Path(file["path"]).name for file in facts["files"]["b"]] == [
        "baseline.json",
        "reference.json",
        "baseline.mp4",
    ]
    assert facts["runs"]["a"]["artifact_sha256"] == facts["runs"]["b"]["artifact_sha256"]


def test_another_artifact_has_errors_and_the_page_shows_them(tiny, reference, tmp_path):
    page = tmp_path / "page.html"
    options = ["--html", page, "--out-dir", tmp_path, "--fail-under", "velocity_error=0.001"]
    options += ["--teacher-forced-blocks", "3", "-q"]
    done = score(reference, tiny.artifact("int8"), *options)
    assert done.exit_code == 1
    assert "velocity_error is 0.0" in done.stderr
    assert "blocks" not in done.stderr
    assert "frames/s" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.mp4", "page.html"]
    assert json.loads((tmp_path / "model.json").read_text())["dump_tensors"] is None
    text = page.read_text()
    facts = json.loads(Reader(text).scripts["comparison"])
    forced = facts["teacher_forced"]
    assert (forced["blocks"], forced["of_blocks"]) == (3, 4)
    assert [step["tokens"] for step in forced["by_step"]] == [(3 + 1 + 3) * 64] * 2
    assert 0 < forced["velocity"]["median"]["value"] <= forced["velocity"]["p99"]["value"] < 0.1
    assert forced["velocity"]["mean"]["uncertainty"] > 0
    layers = forced["layers"]
    assert [layer["after"] for layer in layers] == ["embedding", *(f"layer {i}" for i in range(4))]
    assert layers[0]["relative_error"] == 0
    assert all(0 < layer["increment"] <= 1.5 * layer["relative_error"] < 0.1 for layer in layers[1:])
    assert facts["values"]["velocity_error"] == forced["velocity"]["relative_error"]["value"]
    rows = cells(text, "teacher_forced")
    assert [row[0] for row in rows] == ["", "all steps", "step 0", "step 1"]
    for row, figures in zip(rows[1:], [forced["velocity"], *forced["by_step"]], strict=True):
        for cell, name in zip(row[1:], ("relative_error", "mean", "median", "p99", "p999", "maximum"), strict=False):
            value, uncertainty = (float(part) / 100 for part in cell.removesuffix(" %").split(" ± "))
            assert value == pytest.approx(figures[name]["value"], rel=5e-3)
            assert uncertainty == pytest.approx(figures[name]["uncertainty"], rel=0.06)
    rows = cells(text, "layers")[1:]
    assert [row[0] for row in rows] == [layer["after"] for layer in layers]
    for row, layer in zip(rows[1:], layers[1:], strict=True):
        shown = [float(cell.removesuffix(" %")) / 100 for cell in row[1:3]]
        assert shown == pytest.approx([layer["relative_error"], layer["increment"]], rel=5e-3)
    assert {row[0] for row in cells(text, "runs")} >= {"artifact_sha256", "precision", "seconds", "machine"}
    charts = (
        "Velocities, relative error",
        "Residual stream, relative error behind each layer",
        "What each layer adds to it",
    )
    assert all(f'aria-label="{name}"' in text for name in charts)
    assert "data-span" in text.split('aria-label="Latents, relative error"')[0].rsplit("<svg", 1)[1]  # over time


def cells(page: str, table: str) -> list[list[str]]:
    rows = page.split(f'<table id="{table}">')[1].split("</table>")[0].split("<tr>")[1:]
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]


def changed(**facts):
    """Other facts in reference.json."""

    def change(folder):
        path = folder / "reference.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))

    return change


def setting(**settings):
    def change(folder):
        changed(settings=json.loads((folder / "reference.json").read_text())["settings"] | settings)(folder)

    return change


def flipped(name):
    def change(folder):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return change


def listed(name, **facts):
    def change(folder):
        files = json.loads((folder / "reference.json").read_text())["files"]
        changed(files=files | {name: {"bytes": 1, "sha256": "0" * 64} | facts})(folder)

    return change


def cut(name):
    return lambda folder: os.truncate(folder / name, 1000)


def removed(name):
    return lambda folder: (folder / name).unlink()


STEPS = "blocks/steps-00001.safetensors"
DAMAGED = {
    "no JSON": (lambda folder: (folder / "reference.json").write_text("{"), "cannot be read as JSON"),
    "another JSON": (lambda folder: (folder / "reference.json").write_text("[]"), "is no reference's"),
    "another format": (changed(format="else"), "is no reference's"),
    "a later version": (changed(version=2), "version 2, this lowvram reads version 1"),
    "a version in words": (changed(version="1"), "version '1'"),
    "none there": (removed("reference.json"), "is no reference"),
    "a block less": (removed(STEPS), f"{STEPS} is missing"),
    "no portrait": (removed("portrait.png"), "portrait.png is missing"),
    "no video": (removed("baseline.mp4"), "baseline.mp4 is missing"),
    "a cut block": (cut(STEPS), f"{STEPS} has 1000 bytes"),
    "a bit of a latent": (flipped("blocks/latents-00000.safetensors"), "latents-00000.safetensors has checksum"),
    "a bit of the voice": (flipped("voice.wav"), "voice.wav has checksum"),
    "a bit of the report": (flipped("baseline.json"), "baseline.json has checksum"),
    "another checksum": (listed("portrait.png"), "portrait.png has"),
    "more blocks": (changed(blocks=5), "blocks/latents-00004.safetensors is not listed"),
    "no blocks": (changed(blocks=0), "0 blocks"),
    "blocks in words": (changed(blocks="4"), "4 blocks"),
    "no settings": (changed(settings=None), "is damaged"),
    "a seed in words": (setting(base_seed="7"), "base_seed is '7'"),
    "a strange setting": (setting(colour="red"), "colour is no setting"),
    "a portrait elsewhere": (setting(image="../portrait.png"), "../portrait.png is not listed"),
    "a file elsewhere": (listed("../secret"), "../secret lies outside"),
    "an absolute file": (listed("/etc/passwd"), "/etc/passwd lies outside"),
    "no model": (changed(artifact={}), "is damaged"),
    "a portrait's figures in words": (changed(portrait={"psnr": "30", "ssim": 0.9}), "came back from the VAE as"),
    "a portrait of no number": (changed(portrait={"psnr": float("nan"), "ssim": 0.9}), "came back from the VAE as"),
    "a portrait without a figure": (changed(portrait={"psnr": 30.0}), "KeyError: 'ssim'"),
    "a portrait in words": (changed(portrait="fine"), "is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_reference(tiny, reference, tmp_path, no_run, kind):
    damage, said = DAMAGED[kind]
    folder = shutil.copytree(reference, tmp_path / "ref")
    damage(folder)
    one_line(score(folder, tiny.artifact("int8")), said)


def test_a_reference_knows_how_its_portrait_came_back_if_it_was_recorded_with_it(reference, tmp_path):
    facts = Reference.read(reference).facts["portrait"]
    assert dataclasses.asdict(Reference.read(reference).portrait) == facts
    assert 0 < facts["ssim"] < 1
    folder = shutil.copytree(reference, tmp_path / "ref")
    before = json.loads((folder / "reference.json").read_text())
    del before["portrait"]
    (folder / "reference.json").write_text(json.dumps(before))
    assert Reference.read(folder).portrait is None


@pytest.mark.parametrize("path", ["none", "portrait.png", "fp32"])
def test_no_reference_at_all(tiny, no_run, path):
    one_line(score(tiny.root / path, tiny.artifact("fp32")), "expected a folder that compare record made")


def test_another_model(tiny, reference):
    config = Reference.open(reference).facts["artifact"]["dit"]
    for name, value in (("dim", 5120), ("num_layers", 40), ("num_heads", 1), ("ffn_dim", 3), ("more", 1)):
        component = SimpleNamespace(config=config | {name: value})
        artifact = SimpleNamespace(path=Path("other"), component=lambda _name, found=component: found)
        with pytest.raises(
            InputError, match=f"other is of another model .*: its DiT's {name} is {value}, the baseline's"
        ):
            check_model(artifact, config, "the reference ref")


@pytest.mark.parametrize("key", ["dim", "num_layers", "num_heads", "ffn_dim", "text_len"])
@pytest.mark.parametrize("by", ["score", "score_pair"])
def test_a_pipeline_of_another_model_is_refused_before_it_runs(reference, tmp_path, monkeypatch, key, by):
    monkeypatch.setattr(scoring, "infer", lambda *_a, **_m: pytest.fail("the work has begun"))
    opened = Reference.open(reference)
    config = opened.facts["artifact"]["dit"]
    other, baseline = fake_pipeline(config | {key: 7777}, "other"), fake_pipeline(config, "baseline")
    against = (opened, None) if by == "score" else (baseline, None, (None, None))
    with pytest.raises(InputError, match=f"other is of another model than the .*: its DiT's {key} is 7777"):
        getattr(scoring, by)(other, *against, tmp_path)


def fake_pipeline(config, path):
    artifact = SimpleNamespace(path=Path(path), component=lambda _name: SimpleNamespace(config=config))
    return SimpleNamespace(runtime=SimpleNamespace(artifact=artifact), path=path)


def test_a_reference_keeps_every_setting_of_a_request():
    names = {field.name for field in dataclasses.fields(Request)} - set(_NOT_RECORDED)
    assert set(_KINDS) == names
    assert names == command._RECORDED | {"online_decode"}


@pytest.mark.parametrize("by", ["score", "score_pair"])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_what_is_kept_meanwhile_lies_where_the_runs_do(tiny, reference, tmp_path, monkeypatch, by, named, full):
    seen, out, temporary = [], tmp_path / "out", tmp_path / "tmp"
    out.mkdir(), temporary.mkdir()

    def runs(*arguments, **_more):
        seen.append(arguments[-1])
        assert seen[0].is_dir()
        raise OutputError("the disk is full") if full else InputError("something else")

    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr(command, "open_pipeline", lambda _options: fake_pipeline({}, "any"))
    monkeypatch.setattr(scoring, by, runs)
    against = ["--reference", reference]
    if by == "score_pair":
        against = ["--baseline", tiny.artifact("fp32"), "--image", tiny.portrait, "--audio", tiny.voice]
        against += ["--prompt", PROMPT]
    done = run("compare", "--model", tiny.artifact("int8"), *against, *RUNS, *["--out-dir", out] * named)
    assert seen[0].parent == (out if named else temporary)
    assert not seen[0].exists()
    told = "the folder of " + ("--out-dir" if named else "TMPDIR, as no --out-dir was given")
    assert (told in done.stderr) == full


def test_another_model_is_told_before_checksums_are_compared(tiny, reference, tmp_path, no_run, monkeypatch):
    folder = shutil.copytree(reference, tmp_path / "ref")
    artifact = json.loads((folder / "reference.json").read_text())["artifact"]
    changed(artifact=artifact | {"dit": artifact["dit"] | {"dim": 7777}})(folder)
    monkeypatch.setattr(Reference, "verify", lambda _self: pytest.fail("files are read"))
    one_line(score(folder, tiny.artifact("int8")), "is of another model", "dim is", "7777")
    one_line(score(folder, tiny.artifact("int8"), "--base_seed", "8"), "recorded: 7")


def test_nobody_replaces_it_until_the_page_is_written(tiny, reference, tmp_path, monkeypatch):
    def seen(*_arguments):
        with pytest.raises(InputError, match="in use"), replacing(reference / "reference.json"):
            pass
        raise InputError("it is kept")

    monkeypatch.setattr(command, "open_pipeline", lambda _options: fake_pipeline({}, "any"))
    monkeypatch.setattr(scoring, "score", lambda *_a, **_m: SimpleNamespace(check=lambda _bounds: []))
    monkeypatch.setattr(page, "write_page", seen)
    one_line(score(reference, tiny.artifact("int8"), "--html", tmp_path / "page.html"), "it is kept")


def test_a_reference_in_place_of_a_file(reference):
    one_line(run("compare", reference, "b.json"), "is a reference", "--model and --reference")


def test_a_file_called_record_is_compared_all_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_line(run("compare", "./record", "b.json"), "record is not there; check the path")
    one_line(run("compare", "record", "b.json"), "--out")


@pytest.mark.parametrize("side", ["baseline", "candidate"])
def test_two_videos_of_different_requests_are_not_compared(tmp_path, monkeypatch, side):
    lost = {"baseline": [], "candidate": [], side: ["3 steps"]}
    monkeypatch.setattr(scoring, "infer", lambda pipeline, *_a, **_m: {"quality_lost": lost[pipeline.path]})
    pair = fake_pipeline({}, "candidate"), fake_pipeline({}, "baseline")
    with pytest.raises(OutOfMemoryError, match=f"the {side} was made with 3 steps"):
        scoring.score_pair(*pair, None, (None, None), tmp_path)
