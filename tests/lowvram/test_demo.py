"""The demo as a new user meets it: a face that talks, in both precisions."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from PIL import Image

from lowvram import demo
from lowvram.cli import main
from lowvram.media.video import probe


@pytest.fixture
def short(monkeypatch):
    """One clip."""
    monkeypatch.setattr(demo, "VOICE_S", 1.8)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_a_face_talks(tmp_path):
    done = CliRunner().invoke(main, ["demo", "--out-dir", str(tmp_path / "demo"), "--device", "cpu"])
    assert done.exit_code == 0, (done.output, done.exception)
    said = next(line for line in done.stdout.splitlines() if line.startswith("The mouth's opening"))
    found = dict(part.split() for part in said.removesuffix(".").split(": ")[1].split(", "))
    assert set(found) == {"int8", "bf16"}
    assert all(float(value) > 0.6 for value in found.values()), found
    assert done.stdout.splitlines()[-2:] == [str(tmp_path / "demo" / name) for name in (demo.SHEET, "int8.mp4")]
    assert Image.open(tmp_path / "demo" / demo.SHEET).width > 9 * 128
    for name in demo.PRECISIONS:
        assert probe(tmp_path / "demo" / f"{name}.mp4")["frames"] == 45
        assert json.loads((tmp_path / "demo" / f"{name}.json").read_text())["frames"] == 45
