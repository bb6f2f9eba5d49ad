"""The drawn portrait and the synthesized voice."""

import wave
from pathlib import Path

import numpy as np
import pytest

from lowvram.media.samples import draw_portrait, synth_voice, write_wav
from tests.lowvram.media.sounds import load_speech


@pytest.mark.parametrize(("height", "width"), [(128, 192), (192, 128), (64, 64)])
def test_portrait_is_deterministic_and_has_a_face(height: int, width: int) -> None:
    image = draw_portrait(height, width)
    assert (image.mode, image.size) == ("RGB", (width, height))
    assert image.tobytes() == draw_portrait(height, width).tobytes()
    skin = np.asarray(image)[round(0.55 * height), width // 2].astype(int)
    corner = np.asarray(image)[0, 0].astype(int)
    assert skin[0] > skin[2] + 30
    assert corner[2] > corner[0]


def test_portrait_needs_room() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        draw_portrait(31, 100)


def test_voice_is_deterministic_and_syllabic() -> None:
    voice = synth_voice(3.0)
    assert (voice.dtype, voice.shape) == (np.float32, (48000,))
    assert np.array_equal(voice, synth_voice(3.0))
    assert np.abs(voice).max() == pytest.approx(0.6, abs=1e-6)
    loudness = np.sqrt((voice.reshape(-1, 400) ** 2).mean(axis=1))
    assert loudness.max() > 8 * loudness.min()  # syllables and pauses
    assert loudness.min() > 1e-4  # never silent
    spectrum = np.abs(np.fft.rfft(voice[:16000]))
    assert spectrum[100:4000].sum() > 20 * spectrum[5000:].sum()


@pytest.mark.parametrize(("seconds", "rate"), [(0.0, 16000), (-1.0, 16000), (1.0, 4000)])
def test_voice_needs_a_length_and_a_rate(seconds: float, rate: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        synth_voice(seconds, rate)


def test_wav_round_trip(tmp_path: Path) -> None:
    voice = synth_voice(0.5)
    write_wav(tmp_path / "a.wav", voice, 16000)
    np.testing.assert_allclose(load_speech(tmp_path / "a.wav"), voice, atol=0.5 / 32768 + 1e-7)


def test_wav_clips(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.array([2.0, -2.0, 0.5], np.float32), 24000)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert file.getframerate() == 24000
        assert np.frombuffer(file.readframes(3), "<i2").tolist() == [32767, -32768, 16384]
