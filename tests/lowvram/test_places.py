"""Every command that writes says at the start, in one line, that it cannot, or that something else lies there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

import lowvram.commands.compare as compare_both
import lowvram.demo as demo
from lowvram.cli import main
from lowvram.selftest import examine
from lowvram_quantize.claims import writing


def one_line(done, *parts: str) -> None:
    assert done.exit_code == 2, (done.output, done.exception)
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("lowvram: error: ")]
    assert all(part in line for part in parts), line


@pytest.fixture
def command(tiny, monkeypatch):
    """Runs a command that writes to a place; the work itself is not to begin."""

    def never(*_args: object, **_more: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(demo, "write_trained", never)
    monkeypatch.setattr(compare_both, "open_pipeline", never)
    monkeypatch.setattr(examine, "examine", never)
    model = tiny.artifact("int8")
    request = ["--image", tiny.portrait, "--audio", tiny.voice, "--prompt", "x"]
    known = {
        "demo": ["demo", "--out-dir"],
        "convert": ["convert", "--ckpt-dir", tiny.checkpoint, "--lora", tiny.lora, "--out"],
        "compare": ["compare", "--model", model, "--baseline", model, *request, "--out-dir"],
        "infer": ["infer", "--model", model, *request, "--device", "cpu", "--out"],
        "selftest": ["selftest", "--device", "cpu", "--report"],
    }
    return lambda name, place, *more: CliRunner().invoke(main, [str(a) for a in (*known[name], place, *more)])


COMMANDS = ("demo", "convert", "compare", "infer", "selftest")
PLACES = ("under a file", "read-only", "on a disk that is not there", "behind a link to nothing", "too long a name")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_place_where_nothing_can_be_made(command, tmp_path, name, place):
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "gone").symlink_to(tmp_path / "unplugged" / "disk")
    path = {
        "under a file": tmp_path / "file" / "out.mp4",
        "read-only": Path("/proc/lowvram.mp4"),
        "on a disk that is not there": Path("/proc/mnt/usb/out.mp4"),
        "behind a link to nothing": tmp_path / "gone" / "out.mp4",
        "too long a name": tmp_path / ("x" * 300 + ".mp4"),
    }[place]
    if (name, place) == ("demo", "behind a link to nothing"):
        pytest.skip("the demo makes what is missing")
    one_line(command(name, path))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "gone"]


@pytest.mark.parametrize("name", ["demo", "convert", "compare"])
def test_a_file_where_a_folder_is_expected(command, tmp_path, name):
    (tmp_path / "file").write_bytes(b"mine")
    one_line(command(name, tmp_path / "file"), str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["infer", "selftest"])
def test_a_folder_where_a_file_is_expected(command, tmp_path, name):
    (tmp_path / "out.mp4").mkdir()
    one_line(command(name, tmp_path / "out.mp4"), "a folder; name a file")


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("demo", "portrait.png"),
        ("demo", "int8.mp4"),
        ("demo", "ckpt"),
        ("compare", "model.mp4"),
        ("compare", "baseline.json"),
        ("infer", ""),
        ("selftest", ""),
    ],
)
def test_what_is_there_stays_unless_told(command, tmp_path, name, there):
    place = tmp_path / "out.mp4"
    if there:
        place.mkdir()
    (place / there).write_bytes(b"mine")
    one_line(command(name, place), "--overwrite")
    assert (place / there).read_bytes() == b"mine"


def test_two_demos_in_one_folder(command, tmp_path):
    with writing(tmp_path / "demo", "lowvram demo"):
        one_line(command("demo", tmp_path), f"process {os.getpid()}", "lowvram demo")


@pytest.mark.parametrize("option", ["--image", "--audio", "--prompt", "--model", "--baseline"])
def test_compare_does_not_write_over_what_it_reads(tiny, tmp_path, monkeypatch, option):
    files = {"--image": "model.mp4", "--audio": "baseline.mp4", "--prompt": "model.json"}
    inputs = {"--image": tiny.portrait, "--audio": tiny.voice, "--prompt": "x"}
    inputs |= dict.fromkeys(("--model", "--baseline"), tiny.artifact("int8"))
    out = tiny.artifact("int8") if option in ("--model", "--baseline") else tmp_path
    if option in files:
        file = tmp_path / files[option]
        file.write_text("x") if option == "--prompt" else file.write_bytes(inputs[option].read_bytes())
        inputs[option] = f"@{file}" if option == "--prompt" else file
    before = sorted(out.iterdir())
    arguments = [str(part) for pair in inputs.items() for part in pair]
    done = CliRunner().invoke(main, ["compare", *arguments, "--out-dir", str(out), "--overwrite"])
    one_line(done, "--out-dir", "--model" if option == "--baseline" else option)
    assert sorted(out.iterdir()) == before


@pytest.mark.parametrize("output", ["--out", "--report", "--dump-tensors"])
@pytest.mark.parametrize("option", ["--image", "--audio", "--prompt", "--model", "the model's folder"])
@pytest.mark.parametrize("how", ["itself", "a link", "a hard link", "dots"])
def test_infer_does_not_write_over_what_it_reads(tiny, tmp_path, output, option, how):
    folder = tiny.artifact("int8")
    inputs = {"--image": tmp_path / "a.mp4", "--audio": tmp_path / "b.mp4", "--prompt": tmp_path / "c.mp4"}
    for name, source in {"--image": tiny.portrait, "--audio": tiny.voice}.items():
        inputs[name].write_bytes(source.read_bytes())
    inputs["--prompt"].write_text("A person speaks")
    target = {"--model": folder / "manifest.json", "the model's folder": folder / "new.mp4"}.get(option)
    target = target or inputs[option]
    place = tmp_path / "place.mp4"
    if how == "a link":
        place.symlink_to(target)
    elif how == "a hard link" and target.parent == tmp_path:
        os.link(target, place)
    else:
        place = target.parent / ".." / target.parent.name / target.name if how == "dots" else target
    if output == "--out" and place.suffix != ".mp4":
        pytest.skip("refused for its name already")
    outputs = {"--out": tmp_path / "out.mp4"} | {output: place}
    given = {**inputs, "--prompt": f"@{inputs['--prompt']}", "--model": folder, **outputs}
    before = {path: path.read_bytes() for path in (*inputs.values(), folder / "manifest.json")}
    done = CliRunner().invoke(main, ["infer", "--overwrite", *(str(part) for pair in given.items() for part in pair)])
    one_line(done, output, "--model" if target.parent == folder else option)
    assert {path: path.read_bytes() for path in before} == before
    assert not (folder / "new.mp4").exists()


@pytest.mark.parametrize("name", ["plan", "doctor"])
def test_no_room_for_temporary_files(monkeypatch, name):
    def none(*_args: object, **_more: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "mkdtemp", none)
    done = CliRunner().invoke(main, [name, *(["--no-measure"] if name == "doctor" else [])])
    if name == "plan":
        one_line(done, "no temporary file can be made", "TMPDIR")
    else:
        assert "no temporary file can be made" in done.output
