"""A reference that was recorded once, and any artifact scored against it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowvram.compare import scoring
from lowvram.compare.reference import Reference
from lowvram_kernels.errors import InputError, OutOfMemoryError
from tests.lowvram.compare.calls import PROMPT, RUNS, SETTINGS, one_line, record, run
from tests.lowvram.compare.test_page import Reader


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "ref"
    done = record(tiny, out, *SETTINGS, *RUNS, "--quiet")
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.stdout == f"{out}\n"
    assert [path.name for path in out.parent.iterdir()] == ["ref"]
    return out


def score(reference, model, *more):
    return run("compare", "--reference", reference, "--model", model, *RUNS, *more)


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
    options += ["--teacher-forced-blocks", "3"]
    done = score(reference, tiny.artifact("int8"), *options)
    assert done.exit_code == 1
    assert "velocity_error is 0.0" in done.stderr
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


REPEATED = {
    "seed": ["--base_seed", "8"],
    "drawn seed": ["--base_seed", "-1"],
    "size": ["--size", "704*384"],
    "length of a clip": ["--infer_frames", "12"],
    "clips": ["--num_clip", "1"],
    "steps": ["--sample_steps", "4"],
    "distance": ["--cond-rope-distance", "random"],
    "prompt": ["--prompt", "Somebody else"],
    "start": ["--audio-start", "0.1"],
    "duration": ["--audio-duration", "1"],
    "track": ["--audio-track", "1"],
    "upscale": ["--upscale"],
    "image": ["--image", "{voice}"],
    "audio": ["--audio", "{portrait}"],
}


@pytest.mark.parametrize("words", REPEATED.values(), ids=REPEATED)
def test_what_the_reference_says_otherwise_is_refused_by_name(tiny, reference, no_run, words):
    words = [word.format(voice=tiny.voice, portrait=tiny.portrait) for word in words]
    name = words[0].replace("_", "-")
    one_line(score(reference, tiny.artifact("int8"), *words), name, "recorded: ")


@pytest.mark.parametrize("option", ["--image", "--audio"])
@pytest.mark.parametrize("path", ["no.png", "."])
def test_files_that_cannot_be_read(tiny, reference, no_run, option, path):
    one_line(
        score(reference, tiny.artifact("int8"), option, path), f"{path} cannot be read", "the reference has a copy"
    )


def test_what_it_says_too_is_taken(tiny, reference, no_run):
    same = [*SETTINGS, "--image", tiny.portrait, "--audio", tiny.voice, "--prompt", PROMPT, "--audio-start", "0"]
    done = score(reference, tiny.artifact("int8"), *same, "--cond-rope-distance", "30", "--kv", "int8")
    assert str(done.exception) == "the work has begun"


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
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_reference(tiny, reference, tmp_path, no_run, kind):
    damage, said = DAMAGED[kind]
    folder = shutil.copytree(reference, tmp_path / "ref")
    damage(folder)
    one_line(score(folder, tiny.artifact("int8")), said)


@pytest.mark.parametrize("path", ["none", "portrait.png", "fp32"])
def test_no_reference_at_all(tiny, no_run, path):
    one_line(score(tiny.root / path, tiny.artifact("fp32")), "expected a folder that compare record made")


def test_another_model(tiny, reference):
    opened = Reference.open(reference)
    config = opened.facts["artifact"]["dit"]
    for name, value in (("dim", 5120), ("num_layers", 40), ("num_heads", 1), ("ffn_dim", 3), ("more", 1)):
        component = SimpleNamespace(config=config | {name: value})
        artifact = SimpleNamespace(path=Path("other"), component=lambda _name, found=component: found)
        with pytest.raises(
            InputError, match=f"other is of another model .*: its DiT's {name} is {value}, the baseline's"
        ):
            opened.check_model(artifact)


OPTIONS = {
    "two files too": (["a.json", "b.json"], "not both"),
    "a baseline too": (["--baseline", "x"], "--baseline: the reference is the baseline"),
    "its rings": (["--baseline-kv", "int8"], "--baseline-kv: the reference is the baseline"),
    "less quality": (["--allow-quality-loss"], "--allow-quality-loss"),
    "no blocks": (["--teacher-forced-blocks", "0"], "--teacher-forced-blocks is 0"),
    "a page inside": (["--html", "{reference}/page.html"], "inside --reference"),
    "runs inside": (["--out-dir", "{reference}"], "inside --reference"),
    "no folder": (["--out-dir", "{reference}/no"], "--out-dir"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_options_that_do_not_go_together(tiny, reference, no_run, kind):
    words, said = OPTIONS[kind]
    before = sorted(reference.rglob("*"))
    one_line(score(reference, tiny.artifact("int8"), *(word.format(reference=reference) for word in words)), said)
    assert sorted(reference.rglob("*")) == before


def test_a_model_is_needed_and_one_rank(tiny, reference, no_run, monkeypatch):
    one_line(run("compare", "--reference", reference), "--model is missing")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    one_line(score(reference, tiny.artifact("int8")), "one rank")
    one_line(record(tiny, reference.parent / "other"), "one rank")


def test_a_reference_in_place_of_a_file(reference):
    one_line(run("compare", reference, "b.json"), "is a reference", "--model and --reference")


def test_a_file_called_record_is_compared_all_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_line(run("compare", "./record", "b.json"), "record is not there; check the path")
    one_line(run("compare", "record", "b.json"), "--out")


@pytest.mark.parametrize("side", ["baseline", "candidate"])
def test_two_videos_of_different_requests_are_not_compared(tmp_path, monkeypatch, side):
    lost = {"baseline": [], "candidate": [], side: ["3 steps"]}
    monkeypatch.setattr(scoring, "infer", lambda pipeline, *_a, **_m: {"quality_lost": lost[pipeline]})
    with pytest.raises(OutOfMemoryError, match=f"the {side} was made with 3 steps"):
        scoring.score_pair("candidate", "baseline", None, (None, None), tmp_path)
