"""Clips that end the video before the voice does: said, with the seconds kept and lost, and in the report."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from lowvram.media.samples import draw_portrait, write_wav
from lowvram.request import Request, read_inputs
from tests.lowvram.media.sounds import write_sound


@pytest.fixture(scope="module")
def portrait(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("portrait") / "a.png"
    draw_portrait(128, 128).save(path)
    return path


def tone(seconds: float, rate: int = 16000) -> np.ndarray:
    return (0.3 * np.sin(np.arange(round(seconds * rate)) * 0.05)).astype(np.float32)


def cut(portrait: Path, audio: Path, **settings) -> dict | None:
    return read_inputs(Request(image=portrait, audio=audio, prompt="x", size="128*128", **settings)).facts["voice_cut"]


@pytest.mark.parametrize(
    ("seconds", "settings", "kept_s", "lost_s"),
    [
        (3.0, {"num_clip": 1}, 1.8, 1.2),
        (3.0, {"num_clip": 1, "infer_frames": 12}, 0.36, 2.64),
        (3.0, {"num_clip": 2, "infer_frames": 32}, 2.44, 0.56),
        (3.0, {"num_clip": 1, "audio_start": 1.0}, 1.8, 0.2),
        (4.0, {"num_clip": 1, "audio_start": 1.0, "audio_duration": 2.5}, 1.8, 0.7),
        (1.81, {"num_clip": 1}, 1.8, 0.01),
        (90.0, {"num_clip": 1}, 1.8, 88.2),  # of which a minute is read
        (90.0, {"num_clip": 1, "audio_start": 5.0, "audio_duration": 80.0}, 1.8, 78.2),
    ],
)
def test_a_voice_that_is_cut(tmp_path, portrait, caplog, seconds, settings, kept_s, lost_s):
    write_wav(tmp_path / "a.wav", tone(seconds), 16000)
    with caplog.at_level(logging.WARNING):
        found = cut(portrait, tmp_path / "a.wav", **settings)
    assert found == {"kept_s": pytest.approx(kept_s), "lost_s": pytest.approx(lost_s, abs=1e-6)}
    (line,) = caplog.messages
    assert f"--num_clip {settings['num_clip']} ends the video after {kept_s:.2f} s" in line
    assert f"the last {lost_s:.2f} s of it are left out" in line


@pytest.mark.parametrize(
    ("seconds", "settings"),
    [
        (1.8, {"num_clip": 1}),
        (1.7, {"num_clip": 1}),
        (3.0, {"num_clip": 10000}),
        (3.0, {}),
        (90.0, {"num_clip": 48}),
        (3.0, {"num_clip": 1, "audio_duration": 1.8}),
    ],
)
def test_a_voice_that_is_not(tmp_path, portrait, caplog, seconds, settings):
    write_wav(tmp_path / "a.wav", tone(seconds), 16000)
    with caplog.at_level(logging.WARNING):
        assert cut(portrait, tmp_path / "a.wav", **settings) is None
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("suffix", "codec", "form", "near"),
    [
        (".mp3", "libmp3lame", "mp3", 0.1), (".m4a", "aac", "ipod", 0.1), (".flac", "flac", "flac", 0.01),
        (".ogg", "flac", "ogg", 0.1), (".mkv", "aac", "matroska", 0.1), (".aac", "aac", "adts", None),
    ],
)  # fmt: skip
def test_how_much_is_lost_of_other_files(tmp_path, portrait, suffix, codec, form, near):
    """Of what is not read the file's word is taken; raw AAC has none that is near."""
    audio = write_sound(tmp_path / f"a{suffix}", tone(70.0, 22050), 22050, codec, form)
    found = cut(portrait, audio, num_clip=1)
    assert found is not None
    assert found["kept_s"] == pytest.approx(1.8)
    if near is not None:
        assert found["lost_s"] == pytest.approx(68.2, abs=near)
