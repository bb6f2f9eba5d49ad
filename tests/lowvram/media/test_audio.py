"""Voices: exact decoding, resampling, every container, every refusal, and the sound track's stream."""

import logging
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soxr

from lowvram.media import sound as sound_module
from lowvram.media.audio import AudioTrack, check_duration
from lowvram_kernels.errors import InputError
from tests.lowvram.media.sounds import load_speech

GOLDEN_SPEECH = Path(__file__).resolve().parents[2] / "golden" / "pipeline_tiny" / "inputs" / "speech.wav"


def write_pcm(path: Path, pcm: np.ndarray, rate: int = 16000) -> Path:
    """``pcm`` is int16 [samples] or [samples, channels]."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if pcm.ndim == 1 else pcm.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pcm.astype("<i2").tobytes())
    return path


def write_float(path: Path, samples: np.ndarray, rate: int = 16000) -> Path:
    """A 32-bit float WAV, mono, which the standard library cannot write."""
    body = samples.astype("<f4").tobytes()
    form = np.array([16, 0, 0, 0, 3, 0, 1, 0], "u1").tobytes() + np.array([rate, 4 * rate], "<u4").tobytes()
    chunks = b"WAVEfmt " + form + np.array([4, 32], "<u2").tobytes() + b"data" + np.uint32(len(body)).tobytes() + body
    path.write_bytes(b"RIFF" + np.uint32(len(chunks)).tobytes() + chunks)
    return path


def fitted_sine(samples: np.ndarray, hz: float, rate: int = 16000) -> tuple[float, float]:
    """Amplitude of a sine in the samples, and the signal-to-noise ratio in dB of what is left."""
    time_s = np.arange(len(samples)) / rate
    basis = np.stack([np.sin(2 * np.pi * hz * time_s), np.cos(2 * np.pi * hz * time_s)], 1)
    weights, residual, *_ = np.linalg.lstsq(basis, samples.astype(np.float64), rcond=None)
    return float(np.hypot(*weights)), float(10 * np.log10((samples.astype(np.float64) ** 2).sum() / residual[0]))


def test_golden_speech_is_bit_equal_to_its_pcm() -> None:
    with wave.open(str(GOLDEN_SPEECH)) as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    samples = load_speech(GOLDEN_SPEECH)
    assert samples.dtype == np.float32
    assert np.array_equal(samples, pcm.astype(np.float32) / np.float32(32768))


def test_channels_are_averaged(tmp_path: Path) -> None:
    pcm = np.random.default_rng(0).integers(-32768, 32767, (16000, 3), dtype=np.int16)
    samples = load_speech(write_pcm(tmp_path / "a.wav", pcm))
    np.testing.assert_allclose(samples, (pcm / 32768).mean(axis=1), atol=1e-7)


def test_float_wav_within_full_scale_is_not_scaled(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-1.0, 1.0, 9000).astype(np.float32)
    assert np.array_equal(load_speech(write_float(tmp_path / "a.wav", samples)), samples)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_equals_one_shot_soxr(tmp_path: Path, rate: int) -> None:
    pcm = np.random.default_rng(0).integers(-20000, 20000, 3 * rate + 7, dtype=np.int16)
    samples = load_speech(write_pcm(tmp_path / "a.wav", pcm, rate))
    whole = soxr.resample(pcm.astype(np.float32) / 32768, rate, 16000, quality="HQ")
    assert len(samples) == -(-len(pcm) * 16000 // rate)
    shared = min(len(whole), len(samples))
    assert len(samples) - shared <= 1
    np.testing.assert_allclose(samples[:shared], whole[:shared], atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampled_sine_is_clean(tmp_path: Path, tone: Callable[..., np.ndarray], rate: int) -> None:
    samples = load_speech(write_float(tmp_path / "a.wav", tone(2.0, rate, 1000.0), rate))
    amplitude, snr_db = fitted_sine(samples[2000:-2000], 1000.0)
    assert amplitude == pytest.approx(0.5, rel=1e-3)
    assert snr_db > 90


def test_resampling_removes_what_16_khz_cannot_hold(tmp_path: Path, tone: Callable[..., np.ndarray]) -> None:
    sound = tone(2.0, 48000, 1000.0) + tone(2.0, 48000, 11000.0)
    _, snr_db = fitted_sine(load_speech(write_float(tmp_path / "a.wav", sound, 48000))[2000:-2000], 1000.0)
    assert snr_db > 90


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
@pytest.mark.parametrize("suffix", [".wav", ".mp3", ".m4a", ".flac", ".ogg"])
def test_containers_and_rates(
    tmp_path: Path, tone: Callable[..., np.ndarray], encode_sound: Callable, suffix: str, rate: int, channels: int
) -> None:
    path = encode_sound(tmp_path / f"a{suffix}", np.tile(tone(1.0, rate), (channels, 1)), rate)
    samples = load_speech(path)
    amplitude, snr_db = fitted_sine(samples[4000:12000], 440.0)
    padding = 1200 * 16000 / rate if suffix in (".m4a", ".mp3") else 1  # an encoder fills its last frame
    assert 16000 <= len(samples) <= 16000 + padding
    assert amplitude == pytest.approx(0.5, rel=0.06)
    assert snr_db > 15


def test_ogg_opus(tmp_path: Path, tone: Callable[..., np.ndarray], encode_sound: Callable) -> None:
    path = encode_sound(tmp_path / "a.opus", tone(1.0, 48000), 48000).rename(tmp_path / "a.ogg")
    samples = load_speech(path)
    assert len(samples) == 16000
    assert fitted_sine(samples[4000:12000], 440.0)[1] > 30


def test_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "none.wav", tmp_path):
        with pytest.raises(InputError, match="not a file"):
            load_speech(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.wav", b""),
        ("a.mp3", b"these are words, not sounds\n" * 500),
        ("a.mp3", np.random.default_rng(0).bytes(100_000)),
        ("a.wav", b"ffconcat version 1.0\nfile 'other.wav'\n"),
        ("a.wav", b"#EXTM3U\n#EXTINF:10,\nother.wav\n"),
    ],
)
def test_not_audio(tmp_path: Path, name: str, content: bytes) -> None:
    write_pcm(tmp_path / "other.wav", np.full(16000, 9000, np.int16))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="expected WAV, MP3, M4A, FLAC or OGG"):
        load_speech(tmp_path / name)


def test_no_audio_stream(tmp_path: Path, moving_frames: Callable[..., np.ndarray]) -> None:
    from lowvram.media.video import VideoWriter

    with VideoWriter(tmp_path / "a.mp4", 64, 96) as writer:
        writer.write(moving_frames(3))
    with pytest.raises(InputError, match="no audio stream"):
        load_speech(tmp_path / "a.mp4")


def test_empty(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is empty"):
        load_speech(write_pcm(tmp_path / "a.wav", np.zeros(0, np.int16)))


@pytest.mark.parametrize("level", [0, 3])
def test_silent(tmp_path: Path, level: int) -> None:
    with pytest.raises(InputError, match="is silent"):
        load_speech(write_pcm(tmp_path / "a.wav", np.full(16000, level, np.int16)))


def test_quiet_is_not_silent(tmp_path: Path) -> None:
    assert len(load_speech(write_pcm(tmp_path / "a.wav", np.full(16000, -4, np.int16)))) == 16000


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [16000, 24000])
def test_not_finite(tmp_path: Path, tone: Callable[..., np.ndarray], rate: int, bad: float) -> None:
    sound = tone(1.0, rate)
    sound[5000] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        load_speech(write_float(tmp_path / "a.wav", sound, rate))


def test_truncated_m4a(tmp_path: Path, tone: Callable[..., np.ndarray], encode_sound: Callable) -> None:
    path = encode_sound(tmp_path / "a.m4a", tone(2.0, 44100), 44100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="cannot be read"):
        load_speech(path)


def test_many_bad_packets_are_refused_a_few_are_told(
    tmp_path: Path,
    tone: Callable[..., np.ndarray],
    encode_sound: Callable,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = encode_sound(tmp_path / "a.m4a", tone(3.0, 44100), 44100)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 1500] = np.random.default_rng(9).bytes(1500)
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="packets do not decode"):
        load_speech(path)
    monkeypatch.setattr(sound_module, "MAX_BAD_PACKETS", 0.5)
    with caplog.at_level(logging.WARNING):
        assert len(load_speech(path)) > 32000
    assert "were skipped" in caplog.text


def test_check_duration() -> None:
    check_duration(np.zeros(7680, np.float32), 12)
    with pytest.raises(InputError, match=r"0\.4799 s.*0\.4800 s"):
        check_duration(np.zeros(7679, np.float32), 12)
    with pytest.raises(InputError, match="longer recording"):
        check_duration(np.zeros(7680, np.float32), 12, fps=20)


@pytest.mark.parametrize(
    ("rate", "channels", "layout"), [(16000, 1, "mono"), (44100, 2, "stereo"), (48000, 6, "stereo")]
)
def test_track_streams_the_whole_sound(tmp_path: Path, rate: int, channels: int, layout: str) -> None:
    pcm = np.full((2 * rate, channels), 8000, np.int16)
    with AudioTrack(write_pcm(tmp_path / "a.wav", pcm, rate)) as track:
        sizes = []
        while (frame := track.read(1920)) is not None:
            assert (frame.sample_rate, frame.format.name, frame.layout.name) == (48000, "fltp", layout)
            sizes.append(frame.samples)
    assert sum(sizes) == 96000
    assert set(sizes[:-1]) == {1920}


def test_track_keeps_the_sound(tmp_path: Path, tone: Callable[..., np.ndarray]) -> None:
    with AudioTrack(write_float(tmp_path / "a.wav", tone(1.0, 16000), 16000)) as track:
        frame = track.read(48000)
    assert frame is not None
    amplitude, snr_db = fitted_sine(frame.to_ndarray()[0][4000:-4000], 440.0, 48000)
    assert amplitude == pytest.approx(0.5, rel=1e-3)
    assert snr_db > 60


def test_track_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a file"):
        AudioTrack(tmp_path / "none.wav")
    with AudioTrack(GOLDEN_SPEECH) as track, pytest.raises(ValueError, match="at least one"):
        track.read(0)
    assert AudioTrack(GOLDEN_SPEECH).close() is None  # also before anything was read
