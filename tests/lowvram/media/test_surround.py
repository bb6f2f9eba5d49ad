"""Voices of many channels: microphones of recorders, surround sound."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lowvram.media.audio import AudioTrack
from lowvram.media.voice import load_voice
from tests.lowvram.media.sounds import bursts
from tests.lowvram.media.test_audio import write_pcm
from tests.lowvram.media.test_voice import said


@pytest.mark.parametrize("channels", [3, 4, 6, 7, 8, 10, 16, 32])
def test_recorders_with_many_microphones(tmp_path: Path, channels: int) -> None:
    """Which say of no channel what it is: the voice is heard, whichever it is in."""
    for place in (0, channels // 2, channels - 1):
        pcm = np.zeros((16000, channels), np.int16)
        pcm[:, place] = 20000 * bursts(1, 16000)
        voice = load_voice(write_pcm(tmp_path / "a.wav", pcm))
        np.testing.assert_allclose(voice.samples, pcm[:, place] / 32768 / channels, atol=1e-6)
        with AudioTrack(voice.sound) as track:
            frame = track.read(48000)
        assert frame is not None
        sides = np.abs(frame.to_ndarray()).max(axis=1)
        assert sides == pytest.approx([20000 * 0.4 / 32768 / channels] * 2, rel=0.1)


def write_surround(path: Path, codec: str, form: str, layout: str, loud: list[int], frame_samples: int = 960) -> Path:
    """A second of equal tones in the channels number ``loud``, given to the encoder packet by packet."""
    count = av.AudioLayout(layout).nb_channels
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=48000, layout=layout)
        for start in range(0, 48000, frame_samples):
            samples = np.zeros((frame_samples, count), np.int16)
            samples[:, loud] = (16000 * np.sin(np.arange(start, start + frame_samples) / 20))[:, None]
            frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# layout, the channels that are loud, and how loud left and right are by that; half of full scale is 16000
SURROUND = [
    ("5.1", [0], 1, 0), ("5.1", [1], 0, 1), ("5.1", [2], 0.707, 0.707), ("5.1", [4], 0.707, 0), ("quad", [3], 0, 0.707),
    ("7.1", [7], 0, 0.707), ("7.1", [0, 2, 4], 1 / 0.488, 0.707 / 0.488 / 2.414),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "loud", "left", "right"), SURROUND)
def test_surround_becomes_stereo(
    tmp_path: Path, layout: str, loud: list[int], left: float, right: float, caplog
) -> None:
    voice, words = said(caplog, write_surround(tmp_path / "a.wav", "pcm_s16le", "wav", layout, loud))
    with AudioTrack(voice.sound) as track:
        frame = track.read(48000)
    assert frame is not None
    sides = np.abs(frame.to_ndarray()).max(axis=1)
    assert sides == pytest.approx([left * 0.488, right * 0.488], abs=0.02)
    assert ("times full scale" in words) == (left > 2)  # three channels at once go beyond it
    averaged = 0.488 * voice.facts["gain"] * len(loud) / av.AudioLayout(layout).nb_channels
    assert np.abs(voice.samples).max() == pytest.approx(averaged, rel=0.02)


def test_eight_channels_in_planes_are_read(tmp_path: Path) -> None:
    """Opus decodes to one plane a channel."""
    path = write_surround(tmp_path / "a.opus", "libopus", "ogg", "7.1", [2])
    voice = load_voice(path)
    assert voice.facts["channels"] == 8
    assert np.abs(voice.samples).max() == pytest.approx(0.488 / 8, rel=0.1)
    with AudioTrack(voice.sound) as track:
        frame = track.read(48000)
    assert frame is not None
    assert np.abs(frame.to_ndarray()).max() == pytest.approx(0.707 * 0.488, rel=0.1)
