"""No more of a voice is read than is asked for, and what is read is what it would be."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from lowvram.media.samples import write_wav
from lowvram.media.voice import load_voice
from lowvram.request import Request
from lowvram_kernels.errors import InputError


def tone(seconds: float, rate: int) -> np.ndarray:
    return (0.3 * np.sin(np.arange(round(seconds * rate)) * 0.05)).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("limit_s", [0.5, 1.01])
def test_the_beginning_is_that_of_the_whole(tmp_path, rate, limit_s):
    write_wav(tmp_path / "a.wav", tone(2, rate), rate)
    whole, read = load_voice(tmp_path / "a.wav"), load_voice(tmp_path / "a.wav", limit_s=limit_s)
    assert (whole.goes_on, read.goes_on) == (False, True)
    assert len(read.samples) == pytest.approx(limit_s * 16000, abs=1)
    # Behind the last sample the resampler hears silence.
    near = len(read.samples) - 200
    assert np.abs(read.samples[:near] - whole.samples[:near]).max() < 1e-6
    assert read.sound == whole.sound


@pytest.mark.parametrize("limit_s", [2, 2.001, 3, 60, None])
def test_a_voice_within_the_limit_is_whole(tmp_path, caplog, limit_s):
    write_wav(tmp_path / "a.wav", tone(2, 22050), 22050)
    with caplog.at_level(logging.WARNING):
        read = load_voice(tmp_path / "a.wav", limit_s=limit_s)
    assert not read.goes_on
    assert caplog.records == []
    assert np.array_equal(read.samples, load_voice(tmp_path / "a.wav").samples)


def test_the_limit_counts_from_where_the_part_begins(tmp_path):
    write_wav(tmp_path / "a.wav", tone(3, 16000), 16000)
    read = load_voice(tmp_path / "a.wav", start_s=1, duration_s=1.5, limit_s=0.5)
    assert read.goes_on
    assert np.array_equal(read.samples, load_voice(tmp_path / "a.wav").samples[16000:24000])
    assert (read.sound.start_s, read.sound.duration_s) == (1, 1.5)
    assert not load_voice(tmp_path / "a.wav", start_s=1, duration_s=0.5, limit_s=0.5).goes_on


def test_silence_up_to_the_limit_is_said_to_be_that(tmp_path):
    write_wav(tmp_path / "a.wav", np.concatenate([np.zeros(16000, np.float32), tone(1, 16000)]), 16000)
    with pytest.raises(InputError, match=r"is silent for 0\.5 s, and no more of it is asked for"):
        load_voice(tmp_path / "a.wav", limit_s=0.5)
    assert load_voice(tmp_path / "a.wav", limit_s=1.5).goes_on


@pytest.mark.parametrize(
    ("num_clip", "infer_frames", "limit_s"),
    [(None, 48, None), (1, 48, 60), (28, 48, 60), (29, 48, 60.68), (50, 100, 205), (1, 2000, 85)],
)
def test_what_clips_need(tmp_path, num_clip, infer_frames, limit_s):
    request = Request(
        image=tmp_path / "a.png", audio=tmp_path / "a.wav", prompt="", num_clip=num_clip, infer_frames=infer_frames
    )
    assert request.voice_limit_s == (None if limit_s is None else pytest.approx(limit_s))
