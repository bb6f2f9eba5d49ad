"""``convert --calibrate``: what stands in the manifest then, and that whatever fails leaves the artifact as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import lowvram.calibrate.measure as module
from lowvram.calibrate.calibrate import calibrate
from lowvram.calibrate.inputs import calibration_inputs
from lowvram.cli import main
from lowvram.media.samples import synth_voice, write_wav
from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.claims import reading, writing
from lowvram_quantize.convert import convert
from lowvram_quantize.format import MANIFEST, Artifact
from tests.quantize.checkpoints import base_of, change_dit, clone, contents, replace, replace_json

SMALL = ("--calibrate", "--calibrate-size", "128*128", "--device", "cpu")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, args)])


def source(tiny, checkpoint: Path | None = None) -> list[object]:
    return ["--ckpt-dir", checkpoint or tiny.checkpoint, "--lora", tiny.lora, "--lora-alpha", 2.0]


def refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    last = result.stderr.rstrip("\n").splitlines()[-1]
    assert last.startswith("lowvram: error: "), last
    assert all(part in last for part in parts), last


@pytest.fixture
def artifact(tiny, tmp_path) -> Path:
    """Whose files may be replaced."""
    return clone(tiny.artifact("int8"), tmp_path / "artifact")


@pytest.fixture(scope="module")
def calibrated(tiny, tmp_path_factory) -> tuple[Path, Result]:
    path = clone(tiny.artifact("int8"), tmp_path_factory.mktemp("calibrated") / "artifact")
    return path, run(*source(tiny), "--out", path, *SMALL)


def test_a_finished_artifact_is_calibrated_as_it_is(tiny, calibrated):
    path, result = calibrated
    before, after = contents(tiny.artifact("int8")), contents(path)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{path}\n"
    (added,) = after.keys() - before.keys()
    assert added.startswith("activations.")
    assert {name for name in before if before[name] != after[name]} == {MANIFEST}
    assert all((path / name).samefile(tiny.artifact("int8") / name) for name in before if name != MANIFEST)
    old, new = json.loads(before[MANIFEST]), json.loads(after[MANIFEST])
    assert {key: value for key, value in new.items() if key != "calibration"} == old
    assert new["format_version"] == old["format_version"]
    Artifact.open(path, verify=True).check_unchanged()


def test_the_manifest_says_what_was_measured(calibrated):
    facts = Artifact.open(calibrated[0]).manifest["calibration"]
    assert (facts["image"], facts["audio"], facts["size"]) == (None, None, [128, 128])
    assert (facts["frames"], facts["steps"], facts["device"], facts["dtype"]) == (24, 4, "cpu", "float32")
    tensors = Artifact.open(calibrated[0]).component("dit").facts["tensors"]
    assert list(facts["linears"]) == [name for name, each in tensors.items() if each["scheme"] == "int8"]
    for name, each in facts["linears"].items():
        assert 1e-3 < each["output_error"] < 0.05, name
        assert each["activations"]["tokens"] >= each["rows"] > 0
        assert each["activations"]["amax"] >= each["activations"]["rms"] > 0


def test_one_that_is_calibrated_is_the_same_artifact_to_others(calibrated, tiny):
    """A run that has begun before it, and ranks elsewhere that were not calibrated."""
    from lowvram_quantize.format import of_weights

    plain = Artifact.open(tiny.artifact("int8"))
    assert of_weights(Artifact.open(calibrated[0]).manifest) == plain.manifest


NO_PICTURE, SILENT, SHORT, NO_TEXT = "picture.png", "silent.wav", "short.wav", "bytes.txt"
BAD_INPUTS = {
    "a picture that is none": (["--calibrate-image", NO_PICTURE], NO_PICTURE),
    "no picture": (["--calibrate-image", "nowhere.png"], "nowhere.png"),
    "a folder for a picture": (["--calibrate-image", "."], "."),
    "a voice that is none": (["--calibrate-audio", NO_PICTURE], NO_PICTURE),
    "no voice": (["--calibrate-audio", "nowhere.wav"], "nowhere.wav"),
    "a silent voice": (["--calibrate-audio", SILENT], "silent"),
    "a short voice": (["--calibrate-audio", SHORT], "expected at least 0.4800 s"),
    "no prompt file": (["--calibrate-prompt", "@nowhere.txt"], "nowhere.txt"),
    "a size that is none": (["--calibrate-size", "big"], "unknown size"),
    "a size that is too small": (["--calibrate-size", "8*8"], "area"),
    "no such device": (["--device", "tpu"], "tpu"),
    "a device without a name": (["--device", ""], "--device"),
    "a size without a number": (["--calibrate-size", ""], "unknown size"),
    "a device file for a picture": (["--calibrate-image", os.devnull], os.devnull),
    "a text for a voice": (["--calibrate-audio", "words.txt"], "words.txt"),
    "a prompt that is no text": (["--calibrate-prompt", f"@{NO_TEXT}"], "UTF-8"),
    "a budget that is none": (["--vram-budget", "much"], "no amount of memory"),
    "a picture in the artifact": (["--calibrate-image", "artifact/portrait.png"], "holds"),
}


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_told_before_anything_is_written(tiny, artifact, monkeypatch, case, there):
    options, said = BAD_INPUTS[case]
    folder = artifact.parent
    monkeypatch.chdir(folder)
    Path(NO_PICTURE).write_bytes(b"no picture")
    Path(NO_TEXT).write_bytes(b"\xff\xfe\x00\xd8")
    Path("words.txt").write_text("She says nothing.")
    write_wav(Path(SILENT), synth_voice(2.0) * 0, 16000)
    write_wav(Path(SHORT), synth_voice(0.1), 16000)
    Path("artifact/portrait.png").write_bytes(tiny.portrait.read_bytes())
    out = artifact if there else folder / "artifact" if "in the artifact" in case else folder / "new"
    before = contents(folder)
    refused(run(*source(tiny), "--out", out, "--calibrate", *options), said)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "options",
    [
        ["--calibrate-image", "a.png"],
        ["--calibrate-audio", "a.wav"],
        ["--calibrate-prompt", "A person"],
        ["--calibrate-size", "128*128"],
        ["--device", "cpu"],
        ["--vram-budget", "8GiB"],
    ],
)
def test_options_of_a_calibration_without_it(tiny, tmp_path, options):
    refused(run(*source(tiny), "--out", tmp_path / "out", *options), options[0], "--calibrate")
    assert list(tmp_path.iterdir()) == []


OTHERS = {
    "another DiT": ([], "not made from"),
    "no LoRA": (None, "other LoRAs"),
    "another alpha": (["--lora-alpha", 3.0], "other LoRAs"),
    "another precision": (["--precision", "fp8"], "int8", "fp8 was asked for"),
    "another VAE's": (["--vae", "bf16"], "vae in int8", "bf16"),
    "another text encoder's": (["--text-encoder", "nf4"], "text_encoder in int8", "nf4"),
    "another rotation": (["--rotate", "none"], "--rotate"),
    "with activations": (["--activations", "measured"], "without --activations"),
    "another smoothing": (["--no-smooth"], "--no-smooth"),
    "a budget": (["--precision", "auto", "--max-error", "0.1"], "int8", "mixed was asked for"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_source_or_other_options_are_refused(tiny, artifact, tmp_path, case):
    options, *said = OTHERS[case]
    checkpoint = clone(tiny.checkpoint, tmp_path / "ckpt")
    if case == "another DiT":
        change_dit(base_of(checkpoint), "blocks.0.ffn.0.weight", lambda t: t * 2)
    before = contents(artifact)
    given = ["--ckpt-dir", checkpoint] if options is None else [*source(tiny, checkpoint), *options]
    refused(run(*given, "--out", artifact, *SMALL), *said)
    assert contents(artifact) == before


def test_an_artifact_that_is_in_use(tiny, artifact):
    before = contents(artifact)
    with reading(artifact / MANIFEST):
        refused(run(*source(tiny), "--out", artifact, *SMALL), "in use")
    with writing(artifact, "lowvram convert"):
        refused(run(*source(tiny), "--out", artifact, *SMALL), "is being written by process")
    assert contents(artifact) == before


@pytest.mark.parametrize("file", ["dit.safetensors", "tokenizer/tokenizer.json", MANIFEST])
def test_a_damaged_artifact(tiny, artifact, file):
    replace(artifact / file, (artifact / file).read_bytes()[:-100])
    before = contents(artifact)
    refused(run(*source(tiny), "--out", artifact, *SMALL), file, "convert")
    assert contents(artifact) == before


@pytest.mark.parametrize("parts", [("dit",), ("dit", "vae"), ("dit", "text_encoder", "tokenizer"), ("vae",)])
def test_an_artifact_that_cannot_run(tiny, original, tmp_path, parts):
    path = convert(tiny.checkpoint, tmp_path / "out", components=parts, lora=tiny.lora, lora_alpha=2.0)
    with pytest.raises(CheckpointError, match=r"has no .*audio_encoder.*convert the checkpoint with all"):
        calibrate(Artifact.open(path), original, calibration_inputs(size="128*128"), device="cpu", quiet=True)


@pytest.fixture
def stopped(monkeypatch):
    """Measuring is ended by Ctrl-C at the fifth Linear."""
    measured, seen = module._measured, []

    def stop(*args):
        seen.append(args[0])
        if len(seen) == 5:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(module, "_measured", stop)
    return seen


def test_an_interrupted_one_leaves_a_complete_artifact_and_is_done_anew(tiny, tmp_path, stopped):
    out = tmp_path / "out"
    image, voice = ("--calibrate-image", tiny.portrait), ("--calibrate-audio", tiny.voice)
    result = run(*source(tiny), "--out", out, *SMALL, *image, *voice)
    assert (result.exit_code, len(stopped)) == (1, 5)
    before = contents(out)
    assert "calibration" not in json.loads(before[MANIFEST])
    assert before == contents(tiny.artifact("int8"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    again = run(*source(tiny), "--out", out, *SMALL, *image, *voice, "--calibrate-prompt", "She sings")
    assert again.exit_code == 0, again.output
    facts = json.loads((out / MANIFEST).read_text())["calibration"]
    assert (facts["image"]["file"], facts["audio"]["file"]) == ("portrait.png", "voice.wav")
    assert facts["prompt"] == "She sings"
    assert {name for name, data in contents(out).items() if data != before.get(name, data)} == {MANIFEST}


CHILD = """
import sys, time
from pathlib import Path
from lowvram.cli import main
from lowvram_quantize.original import Original
def merged(self, name):
    Path(sys.argv[1]).touch()
    time.sleep(120)
Original.merged = merged
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_killed_one_leaves_the_artifact_as_it_was(tiny, artifact, tmp_path):
    before, mark = contents(artifact), tmp_path / "measuring"
    args = [sys.executable, "-c", CHILD, mark, "convert", *source(tiny), "--out", artifact, *SMALL]
    child = subprocess.Popen([*map(str, args)], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while not mark.exists():
            assert child.poll() is None, "the child ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert contents(artifact) == before
    Artifact.open(artifact, verify=True)
    with reading(artifact / MANIFEST):  # no claim is left
        pass


def test_a_full_disk_leaves_the_manifest(tiny, artifact, monkeypatch):
    before = contents(artifact)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowvram_quantize.amend.os.fsync", full)
    monkeypatch.setattr("lowvram.calibrate.calibrate.measure", lambda *_args, **_options: {})
    refused(run(*source(tiny), "--out", artifact, *SMALL), "activations.", "No space left")
    assert contents(artifact) == before


DAMAGE = {
    "no dictionary": lambda facts: facts.update(calibration=[1]),
    "no Linears": lambda facts: facts["calibration"].pop("linears"),
    "Linears that are a list": lambda facts: facts["calibration"].update(linears=[]),
    "an error that is text": lambda facts: linear(facts).update(output_error="0.1"),
    "no activations": lambda facts: linear(facts).pop("activations"),
    "a statistic that is text": lambda facts: linear(facts)["activations"].update(amax="1"),
    "activations that are no file": lambda facts: facts["calibration"].update(activations="activations.safetensors"),
    "activations elsewhere": lambda facts: facts["calibration"]["activations"].update(file="../activations"),
    "a size that is text": lambda facts: facts["calibration"].update(size="128*128"),
}


def linear(facts: dict) -> dict:
    return next(iter(facts["calibration"]["linears"].values()))


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_calibration_is_told(calibrated, tmp_path, case):
    path = clone(calibrated[0], tmp_path / "spoiled")
    replace_json(path / MANIFEST, DAMAGE[case])
    with pytest.raises(CheckpointError, match="is damaged"):
        Artifact.open(path)
