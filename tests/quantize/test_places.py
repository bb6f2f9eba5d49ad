"""What ``convert`` reads is never in the way of what it writes, however the two are called."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import lowvram_quantize.places as module
from lowvram.cli import main
from lowvram_kernels.errors import OutputError
from lowvram_quantize.claims import lock_file, writing
from lowvram_quantize.places import same, within
from lowvram_quantize.publish import partial_of
from lowvram_quantize.source import AUDIO_ENCODER_FOLDER, BASE_FOLDER
from tests.quantize.checkpoints import clone, contents, lora_of, run

FOLDERS = {
    "--ckpt-dir": "ckpt",
    "--audio-encoder-dir": f"ckpt/{BASE_FOLDER}/{AUDIO_ENCODER_FOLDER}",
    "--tokenizer-dir": f"ckpt/{BASE_FOLDER}/google/umt5-xxl",
    "--lora": "ckpt/LiveAvatar",
}
FILES = {
    "--dit-file": "models/dit.safetensors",
    "--vae-file": "models/vae.pth",
    "--text-encoder-file": "models/text.pth",
    "--lora": "models/lora.safetensors",
}


@pytest.fixture
def there(tiny, tmp_path, monkeypatch) -> Path:
    """A folder with a checkpoint, repackaged files and an artifact; it is the current one."""
    clone(tiny.checkpoint, tmp_path / "ckpt")
    (tmp_path / "other").mkdir()
    (tmp_path / "models").mkdir()
    for name in FILES.values():
        (tmp_path / name).write_bytes(b"weights")
    (tmp_path / "models" / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*arguments: object) -> str:
    if arguments[0] == "--lora":
        arguments = (*arguments, "--ckpt-dir", "other")
    before = contents(Path.cwd())
    done = CliRunner().invoke(main, ["convert", *(str(argument) for argument in arguments), "--overwrite"])
    assert done.exit_code == 2, done.output
    assert contents(Path.cwd()) == before
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("option", FOLDERS)
@pytest.mark.parametrize("how", ["itself", "inside", "deep inside", "dots", "a link", "a link to what is above it"])
def test_out_in_a_folder_that_is_read(there, option, how):
    given = Path(FOLDERS[option])
    (there / "link").symlink_to(given if how == "a link" else given.parent)
    out = {
        "itself": given,
        "inside": given / "new",
        "deep inside": given / "new",
        "dots": given / ".." / "." / given.name / "new",
        "a link": Path("link"),
        "a link to what is above it": Path("link") / given.name / "new",
    }[how]
    if how == "deep inside":
        (given / "new").mkdir()
        out = given / "new" / "one"
    said = refused(option, given, "--out", out)
    assert option in said
    assert "choose another --out" in said


@pytest.mark.parametrize("option", FILES)
@pytest.mark.parametrize("how", ["itself", "above it", "a link to it", "a link to its folder", "named by a link"])
def test_out_with_a_file_that_is_read(there, option, how):
    file = Path(FILES[option])
    (there / "file").symlink_to(file)
    (there / "folder").symlink_to(file.parent)
    given, out = {
        "itself": (file, file),
        "above it": (file, file.parent),
        "a link to it": (file, "file"),
        "a link to its folder": (file, "folder"),
        "named by a link": ("file", file.parent),
    }[how]
    said = refused(option, given, "--out", out)
    assert option in said
    assert "choose another --out" in said


def test_out_that_holds_what_links_in_the_checkpoint_lead_to(tiny, there):
    """Files of a folder that are links, as in a cache: what they lead to counts."""
    shutil.copytree(there / "ckpt" / BASE_FOLDER, there / "blobs")
    (there / "blobs" / "manifest.json").write_text("{}")
    (there / "snapshot").mkdir()
    for path in (there / "blobs").iterdir():
        (there / "snapshot" / path.name).symlink_to(path)
    said = refused("--ckpt-dir", "snapshot", "--out", "blobs")
    assert "holds" in said
    assert str(there / "blobs") in said


@pytest.mark.parametrize("name", ["out.partial/a", "out.partial"])
def test_what_is_read_is_not_what_is_unfinished(there, name):
    shutil.copytree(there / "ckpt", there / name)
    assert "out.partial" in refused("--ckpt-dir", name, "--out", "out")


@pytest.mark.parametrize("kind", ["a file", "a link", "strangers", "a link in it", "a hard link in it"])
def test_an_unfinished_folder_of_somebody_else_stays(there, kind):
    partial = there / "out.partial"
    if kind == "a file":
        partial.write_text("mine")
    elif kind == "a link":
        partial.symlink_to(there / "models")
    else:
        partial.mkdir()
    if kind == "strangers":
        (partial / "thesis.odt").write_text("mine")
    elif kind == "a link in it":
        (partial / "dit.safetensors").symlink_to(there / "models" / "dit.safetensors")
    elif kind == "a hard link in it":
        os.link(there / "models" / "dit.safetensors", partial / "dit.safetensors")
    assert "move it away" in refused("--ckpt-dir", "ckpt", "--out", "out")


def test_what_is_replaced_takes_nothing_else_with_it(tiny, tmp_path):
    """A folder that is called like the one that an artifact gives way to is somebody's."""
    run(tiny.checkpoint, tmp_path / "out", components=("tokenizer",))
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "thesis.odt").write_text("mine")
    run(tiny.checkpoint, tmp_path / "out", components=("tokenizer",), overwrite=True)
    assert (tmp_path / "out.replaced" / "thesis.odt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.replaced"]
    assert not partial_of(tmp_path / "out").exists()


def test_beside_what_is_read_is_fine(tiny, there):
    out = there / "ckpt2"
    run(there / "ckpt", out, components=("tokenizer",), lora=lora_of(there / "ckpt"), lora_alpha=None)
    assert out.is_dir()


@pytest.mark.parametrize(("a", "b"), [("Voice.WAV", "voice.wav"), ("new/OUT.mp4", "NEW/out.mp4"), ("ü.mp4", "Ü.mp4")])
@pytest.mark.parametrize("folds", [True, False])
def test_case_counts_where_the_disk_says_so(tmp_path, monkeypatch, a, b, folds):
    (tmp_path / "voice.wav").write_bytes(b"")
    monkeypatch.setattr(module, "_folds_case", lambda folder: folds)
    assert same(tmp_path / a, tmp_path / b) == folds
    assert not same(tmp_path / a, tmp_path / "other")


def test_this_disk_is_asked_whether_case_counts(tmp_path):
    (tmp_path / "a").mkdir()
    there = (tmp_path / "A").exists()
    assert module._folds_case(tmp_path) == there
    assert within(tmp_path / "A" / "x", tmp_path / "a") == there
    assert not module._folds_case(tmp_path / "none")


def test_a_lock_is_never_written_through_a_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    lock_file(tmp_path / "out").symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match="cannot be made beside it"), writing(tmp_path / "out", "x"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
