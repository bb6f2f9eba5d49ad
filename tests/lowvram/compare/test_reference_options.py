"""Options of scoring: what goes together, what the reference says itself, and where nothing is written."""

from __future__ import annotations

import pytest

from tests.lowvram.compare.calls import PROMPT, RUNS, SETTINGS, one_line, record, run, score, there

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


OPTIONS = {
    "two files too": (["a.json", "b.json"], "not both"),
    "a baseline too": (["--baseline", "x"], "--baseline: the reference is the baseline"),
    "its rings": (["--baseline-kv", "int8"], "--baseline-kv: the reference is the baseline"),
    "less quality": (["--allow-quality-loss"], "--allow-quality-loss"),
    "nothing to overwrite": (["--overwrite"], "--overwrite has an effect with --out-dir or --html only"),
    "the page in place of the portrait": (["--image", "{mine}", "--html", "{mine}", "--overwrite"], "--image"),
    "of the voice": (["--audio", "{mine}", "--html", "{mine}", "--overwrite"], "--audio"),
    "of the prompt": (["--prompt", "@{mine}", "--html", "{mine}", "--overwrite"], "--prompt"),
    "of the model": (["--html", "{model}/manifest.json", "--overwrite"], "inside --model"),
    "a run in place of the portrait": (["--image", "{run}", "--out-dir", "{folder}", "--overwrite"], "--image"),
    "of the voice, by a run": (["--audio", "{run}", "--out-dir", "{folder}", "--overwrite"], "--audio"),
    "of the prompt, by a run": (["--prompt", "@{run}", "--out-dir", "{folder}", "--overwrite"], "--prompt"),
    "no blocks": (["--teacher-forced-blocks", "0"], "--teacher-forced-blocks is 0"),
    "a page inside": (["--html", "{reference}/page.html"], "inside --reference"),
    "runs inside": (["--out-dir", "{reference}"], "inside --reference"),
    "no folder": (["--out-dir", "{reference}/no"], "--out-dir"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_options_that_do_not_go_together(tiny, reference, tmp_path, no_run, kind):
    words, said = OPTIONS[kind]
    there(tmp_path, "mine.png", "model.mp4")
    before = sorted(reference.rglob("*"))
    places = {"reference": reference, "model": tiny.artifact("int8"), "folder": tmp_path}
    places |= {"mine": tmp_path / "mine.png", "run": tmp_path / "model.mp4"}
    one_line(score(reference, tiny.artifact("int8"), *(word.format(**places) for word in words)), said)
    assert sorted(reference.rglob("*")) == before
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(
        ["mine.png", "model.mp4"], b"mine"
    )


PAIR = {
    "less quality": (["--allow-quality-loss"], "--allow-quality-loss would change what is compared"),
    "less quality, in full": (["--allow_quality_loss", "true"], "--allow-quality-loss would change what is compared"),
    "nothing to overwrite": (["--overwrite"], "--overwrite has an effect with --out-dir or --html only"),
    "no blocks": (["--teacher-forced-blocks", "0"], "--teacher-forced-blocks is 0"),
    "the page in place of the portrait": (["--html", "{portrait}", "--overwrite"], "--image"),
    "of the baseline": (["--html", "{model}/manifest.json", "--overwrite"], "inside --model"),
}


@pytest.mark.parametrize("kind", PAIR)
def test_options_that_do_not_go_with_a_baseline(tiny, no_run, kind):
    words, said = PAIR[kind]
    model = tiny.artifact("int8")
    inputs = ["--image", tiny.portrait, "--audio", tiny.voice, "--prompt", PROMPT, *SETTINGS, *RUNS]
    words = [word.format(portrait=tiny.portrait, model=model) for word in words]
    one_line(run("compare", "--model", model, "--baseline", tiny.artifact("fp32"), *inputs, *words), said)


def test_a_model_is_needed_and_one_rank(tiny, reference, no_run, monkeypatch):
    one_line(run("compare", "--reference", reference), "--model is missing")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    one_line(score(reference, tiny.artifact("int8")), "one rank")
    one_line(record(tiny, reference.parent / "other"), "one rank")
