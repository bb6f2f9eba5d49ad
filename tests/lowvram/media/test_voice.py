"""Where in a file the voice is: containers, encoders' delays, tracks, channels, levels, parts, and what is missing."""

from __future__ import annotations

import logging
import re
import wave
from pathlib import Path

import numpy as np
import psutil
import pytest
import soxr

from lowvram.media.audio import AudioTrack
from lowvram.media.sound import Sound
from lowvram.media.voice import Voice, load_voice
from lowvram_kernels.errors import InputError
from tests.lowvram.media.sounds import bursts, lag, load_speech, write_sound
from tests.lowvram.media.test_audio import write_float, write_pcm

CASES = Path(__file__).parent / "cases"

# name, codec, FFmpeg's format, rate
CONTAINERS = [
    ("a.caf", "pcm_s16le", "caf", 44100), ("a.aiff", "pcm_s16be", "aiff", 22050), ("a.au", "pcm_s16be", "au", 16000),
    ("a.w64", "pcm_s16le", "w64", 48000), ("a.tta", "tta", "tta", 44100), ("a.wv", "wavpack", "wv", 44100),
    ("a.mov", "pcm_s24le", "mov", 48000), ("a.mkv", "flac", "matroska", 32000), ("a.nut", "pcm_f64le", "nut", 16000),
    ("a.voc", "pcm_s16le", "voc", 16000), ("a.webm", "libopus", "webm", 48000), ("a.avi", "libmp3lame", "avi", 44100),
    ("a.flv", "aac", "flv", 44100), ("a.ts", "aac", "mpegts", 48000), ("a.mpg", "mp2", "mpeg", 44100),
    ("a.wav", "pcm_alaw", "wav", 8000), ("b.wav", "adpcm_ms", "wav", 22050), ("a.wtv", "mp2", "wtv", 48000),
    ("a.3gp", "libopencore_amrnb", "3gp", 8000), ("a.amr", "libopencore_amrnb", "amr", 8000),
]  # fmt: skip


@pytest.mark.parametrize(("name", "codec", "form", "rate"), CONTAINERS, ids=[c[0] for c in CONTAINERS])
def test_containers(tmp_path: Path, name: str, codec: str, form: str, rate: int) -> None:
    sound = bursts(1.5, rate)
    voice = load_voice(write_sound(tmp_path / name, sound, rate, codec, form))
    wanted = soxr.resample(sound, rate, 16000, quality="HQ")
    assert 0 <= len(voice.samples) - len(wanted) < 16000 * 0.08  # an encoder fills its last frame
    if "amr" in codec:  # which is made for speech, and FFmpeg's own delay in 3GP is off by 10 samples at 8 kHz
        assert abs(lag(voice.samples, wanted)) <= 20
    else:
        assert abs(lag(voice.samples, wanted)) <= 2
        assert np.corrcoef(voice.samples[: len(wanted)], wanted)[0, 1] > 0.97
    assert voice.facts["container"]
    with AudioTrack(voice.sound) as track:
        frame = track.read(10_000_000)
    assert frame is not None
    assert abs(frame.samples - 3 * len(voice.samples)) <= 3


# name, codec, FFmpeg's format, rate, options: streams that do not say what their encoder put in front.
NO_TAG = {"write_xing": "0"}
RAW = [
    ("a.mp3", "libmp3lame", "mp3", 44100, NO_TAG), ("b.mp3", "libmp3lame", "mp3", 16000, NO_TAG),
    ("tagged.mp3", "libmp3lame", "mp3", 44100, {}), ("a.aac", "aac", "adts", 44100, {}),
    ("b.aac", "aac", "adts", 16000, {}), ("a.latm", "aac", "latm", 48000, {}), ("a.mp2", "mp2", "mp2", 48000, {}),
    ("a.ac3", "ac3", "ac3", 48000, {}), ("a.eac3", "eac3", "eac3", 48000, {}), ("a.opus", "libopus", "ogg", 48000, {}),
    ("a.g722", "g722", "g722", 16000, {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "codec", "form", "rate", "options"), RAW, ids=[c[0] for c in RAW])
def test_encoders_delay_is_left_out(tmp_path: Path, name: str, codec: str, form: str, rate: int, options: dict) -> None:
    sound = bursts(2.0, rate)
    voice = load_voice(write_sound(tmp_path / name, sound, rate, codec, form, options))
    wanted = soxr.resample(sound, rate, 16000, quality="HQ")
    assert abs(lag(voice.samples, wanted)) <= 1
    with AudioTrack(voice.sound) as track:
        frame = track.read(10_000_000)
    assert frame is not None
    assert abs(lag(frame.to_ndarray()[0], soxr.resample(sound, rate, 48000, quality="HQ"))) <= 2


def test_playlists_and_samples_without_a_header_are_no_voice(tmp_path: Path) -> None:
    write_pcm(tmp_path / "other.wav", np.full(16000, 9000, np.int16))
    texts = {
        "a.wav": "ffconcat version 1.0\nfile 'other.wav'\n",
        "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1.0,\nother.wav\n#EXT-X-ENDLIST\n",
        "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
        "a.sbg": "-SE\nts: 200+10/50\n00:00 ts\n01:00 ts\n",
        "a.txt": "Words, and no sound.\n" * 100,
        "a.ul": "Words, and no sound.\n" * 1000,
        "a.sw": "Words, and no sound.\n" * 1000,
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=r"cannot be read|no audio stream"):
            load_voice(tmp_path / name)


def said(caplog: pytest.LogCaptureFixture, path: Path, **options) -> tuple[Voice, str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        voice = load_voice(path, **options)
    return voice, caplog.text


def test_a_screen_recording_with_a_silent_first_track(caplog: pytest.LogCaptureFixture) -> None:
    voice, words = said(caplog, CASES / "two_tracks.mkv")
    assert (voice.facts["track"], voice.facts["tracks"], voice.sound.track) == (2, 2, 1)
    assert "track 2 is the first that is not silent" in words
    assert said(caplog, CASES / "two_tracks.mkv", track=2)[1] == ""
    with AudioTrack(voice.sound) as track:
        frame = track.read(48000)
    assert frame is not None
    assert np.abs(frame.to_ndarray()).max() > 0.1


SILENCE, HISS = np.zeros(16000, np.float32), np.full(16000, 5e-5, np.float32)
TRACKS = [
    ([SILENCE, bursts(1, 16000)], 2), ([HISS, SILENCE, bursts(1, 16000)], 3), ([bursts(1, 16000), SILENCE], 1),
    ([bursts(1, 16000), 0.5 * bursts(1, 16000)], 1), ([np.stack([SILENCE, SILENCE]), bursts(1, 16000)], 2),
]  # fmt: skip


@pytest.mark.parametrize(("tracks", "chosen"), TRACKS)
def test_the_first_track_that_is_not_silent(tmp_path: Path, tracks: list, chosen: int, caplog) -> None:
    path = write_sound(tmp_path / "a.mkv", tracks, 16000, "flac", "matroska")
    voice, words = said(caplog, path)
    assert voice.facts["track"] == chosen
    assert ("is the first that is not silent" in words) == (chosen > 1)


def test_tracks_that_are_asked_for(tmp_path: Path) -> None:
    path = write_sound(
        tmp_path / "a.mkv", [bursts(1, 16000), SILENCE, 0.5 * bursts(1, 16000)], 16000, "flac", "matroska"
    )
    loud, soft = (load_voice(path, track=number).samples for number in (1, 3))
    np.testing.assert_allclose(soft, loud / 2, atol=1e-4)
    with pytest.raises(InputError, match=r"track 2 of 3, is silent"):
        load_voice(path, track=2)
    for number in (0, 4):
        with pytest.raises(InputError, match=rf"--audio-track is {number}, .* has 3 sound tracks; expected 1 to 3"):
            load_voice(path, track=number)
    with pytest.raises(InputError, match="all 2 tracks, is silent"):
        load_voice(write_sound(tmp_path / "b.mkv", [SILENCE, SILENCE], 16000, "flac", "matroska"))


def test_a_track_that_does_not_decode_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_sound(tmp_path / "a.mkv", [bursts(1, 16000), bursts(1, 16000)], 16000, "flac", "matroska")
    data = path.read_bytes()
    first = data.index(b"A_FLAC")
    path.write_bytes(data[:first] + b"A_XXXX" + data[first + 6 :])
    voice, words = said(caplog, path)
    assert voice.facts["track"] == 2
    assert "no decoder for its track 1" in words


LEFT, RIGHT = bursts(1, 16000), bursts(1, 16000)[::-1].copy()
# Channels, and which of them is used alone (None: their average).
CHANNELS = {
    "one turned around": ([LEFT, -LEFT], 1),
    "turned around and softer": ([LEFT, -0.8 * LEFT], 1),
    "turned around and louder": ([0.7 * LEFT, -0.9 * LEFT], 2),
    "the sides of 5.1": ([0 * LEFT, 0 * LEFT, 0 * LEFT, 0 * LEFT, LEFT, -LEFT], 5),
    "turned around under hiss": ([LEFT + 1e-3 * RIGHT, -0.99 * LEFT], 1),
    "equal": ([LEFT, LEFT], None),
    "one alone": ([0 * LEFT, LEFT], None),
    "unlike": ([LEFT, RIGHT], None),
    "the centre of 5.1": ([0 * LEFT, 0 * LEFT, LEFT, 0 * LEFT, 0 * LEFT, 0 * LEFT], None),
    "turned around and much softer": ([LEFT, -0.3 * LEFT], None),
}  # fmt: skip


@pytest.mark.parametrize(("channels", "alone"), CHANNELS.values(), ids=CHANNELS)
def test_channels_that_cancel_each_other(tmp_path: Path, channels: list, alone: int | None, caplog) -> None:
    planes = np.stack(channels)
    voice, words = said(caplog, write_sound(tmp_path / "a.wav", planes, 16000, "pcm_s16le", "wav"))
    wanted = planes.mean(axis=0) if alone is None else planes[alone - 1]
    np.testing.assert_allclose(voice.samples, wanted, atol=1e-4)
    assert voice.facts["channel"] == alone
    assert ("cancel each other" in words) == (alone is not None)
    with AudioTrack(voice.sound) as track:
        frame = track.read(16000)
    assert frame is not None
    assert track.layout == ("stereo" if alone is None else "mono")
    assert np.abs(frame.to_ndarray()).max() > 0.1


def whole(peak: float) -> np.ndarray:
    return np.rint(bursts(1, 16000) / np.abs(bursts(1, 16000)).max() * peak)


# What a float file holds, and what it is to be times.
LEVELS = {
    "a little beyond": (3.0 * bursts(1, 16000), 1 / 1.2),
    "as whole 16 bit": (whole(3734), 2.0**-15),
    "as full 16 bit": (whole(32767), 2.0**-15),
    "as whole 24 bit": (whole(2.0**20), 2.0**-23),
    "as whole 32 bit": (whole(2.0**30), 2.0**-31),
    "as 16 bit and resampled": (whole(3000) + 0.25, 1 / 3000.25),
    "far beyond anything": (1e20 * bursts(1, 16000), 1 / 4e19),
    "full scale": (bursts(1, 16000) / 0.4, 1.0),
    "soft": (0.01 * bursts(1, 16000), 1.0),
}


@pytest.mark.parametrize(("samples", "gain"), LEVELS.values(), ids=LEVELS)
def test_floats_beyond_full_scale(tmp_path: Path, samples: np.ndarray, gain: float, caplog) -> None:
    voice, words = said(caplog, write_float(tmp_path / "a.wav", samples.astype(np.float32)))
    assert voice.facts["gain"] == pytest.approx(gain, rel=1e-3)
    np.testing.assert_allclose(voice.samples, samples * gain, rtol=2e-3, atol=1e-5)
    assert np.abs(voice.samples).max() <= 1
    assert ("times full scale" in words) == (gain != 1)
    with AudioTrack(voice.sound) as track:
        frame = track.read(48000)
    assert frame is not None
    assert np.abs(frame.to_ndarray()).max() < 1.1  # the resampler of the track overshoots a little


def test_whole_numbers_that_mean_silence_are_silent(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="silent"):
        load_speech(write_float(tmp_path / "a.wav", np.tile(np.float32([2, -2]), 8000)))


# name, codec, format, rate and options of files that are cut in half.
CUT = [
    ("a.wav", "pcm_s16le", "wav", 16000, {}), ("b.wav", "pcm_f32le", "wav", 48000, {}),
    ("a.rf64", "pcm_s16le", "wav", 16000, {"rf64": "always"}), ("a.w64", "pcm_s16le", "w64", 16000, {}),
    ("a.caf", "pcm_s16le", "caf", 44100, {}), ("a.aiff", "pcm_s16be", "aiff", 16000, {}),
    ("a.au", "pcm_s16be", "au", 16000, {}), ("a.flac", "flac", "flac", 16000, {}),
    ("a.mp3", "libmp3lame", "mp3", 44100, {}), ("a.mkv", "flac", "matroska", 16000, {}),
    ("a.m4a", "aac", "mp4", 44100, {"movflags": "faststart"}), ("a.avi", "libmp3lame", "avi", 44100, {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "codec", "form", "rate", "options"), CUT, ids=[c[0] for c in CUT])
def test_less_than_the_header_says(
    tmp_path: Path, name: str, codec: str, form: str, rate: int, options: dict, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_sound(tmp_path / name, bursts(4, rate), rate, codec, form, options)
    assert said(caplog, path)[1] == ""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    voice, words = said(caplog, path)
    assert 0.5 < len(voice.samples) / 16000 < 2.5
    assert (found := re.search(r"ends after (\S+) s, its header says (\S+) s", words))
    assert float(found[1]) == pytest.approx(len(voice.samples) / 16000, abs=0.02)
    assert float(found[2]) == pytest.approx(4.0, abs=0.1)
    # Of a part that is there nothing is missing.
    assert "header" not in said(caplog, path, duration_s=0.5)[1]


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_a_size_that_its_writer_did_not_know_is_no_promise(tmp_path: Path, size: int, caplog) -> None:
    path = write_pcm(tmp_path / "a.wav", (20000 * bursts(1, 16000)).astype(np.int16))
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = size.to_bytes(4, "little")
    path.write_bytes(data)
    voice, words = said(caplog, path)
    assert len(voice.samples) == 16000
    assert words == ""


def test_a_longer_picture_is_no_missing_sound(tmp_path: Path, moving_frames, caplog: pytest.LogCaptureFixture) -> None:
    from lowvram.media.video import VideoWriter

    write_pcm(tmp_path / "a.wav", (20000 * bursts(1, 16000)).astype(np.int16))
    with VideoWriter(tmp_path / "a.mp4", 64, 96, audio_path=tmp_path / "a.wav", trim_to_audio=False) as writer:
        writer.write(moving_frames(75))
    assert said(caplog, tmp_path / "a.mp4")[1] == ""


# start, duration; first and last sample of what is to come, of 3 s
PARTS = [(0.5, None, 8000, 48000), (0.0, 1.0, 0, 16000), (1.25, 0.75, 20000, 32000), (2.0, 1.0, 32000, 48000),
         (0.0, 3.0, 0, 48000), (1 / 3, 0.6, 5333, 14933)]  # fmt: skip


@pytest.mark.parametrize(("start_s", "duration_s", "first", "last"), PARTS)
@pytest.mark.parametrize("form", ["wav", "mp3"])
def test_a_part_of_the_file(
    tmp_path: Path, form: str, start_s: float, duration_s: float | None, first: int, last: int, caplog
) -> None:
    sound = bursts(3, 16000)
    path = write_sound(tmp_path / f"a.{form}", sound, 16000, {"wav": "pcm_s16le", "mp3": "libmp3lame"}[form], form)
    voice, words = said(caplog, path, start_s=start_s, duration_s=duration_s)
    assert words == ""
    assert len(voice.samples) == last - first
    assert np.corrcoef(voice.samples, sound[first:last])[0, 1] > 0.97
    assert voice.facts["seconds"] == pytest.approx((last - first) / 16000, abs=1e-3)
    with AudioTrack(voice.sound) as track:
        frame = track.read(10_000_000)
    assert frame is not None
    assert abs(frame.samples - 3 * (last - first)) <= 1
    assert abs(lag(frame.to_ndarray()[0], soxr.resample(sound[first:last], 16000, 48000))) <= 2


def test_parts_that_are_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_sound(tmp_path / "a.wav", bursts(2, 16000), 16000, "pcm_s16le", "wav")
    for start_s in (2.0, 2.5, 1e9):
        with pytest.raises(InputError, match=r"is 2\.000 s long: --audio-start is .* expected less"):
            load_voice(path, start_s=start_s)
    voice, words = said(caplog, path, start_s=1.5, duration_s=2.0)
    assert len(voice.samples) == 8000
    assert "is 2.00 s long: 0.50 s are left behind --audio-start" in words
    quiet = write_sound(tmp_path / "b.wav", np.r_[bursts(1, 16000), SILENCE], 16000, "pcm_s16le", "wav")
    with pytest.raises(InputError, match="is silent behind 1 s"):
        load_voice(quiet, start_s=1.0)


def test_channels_that_come_and_go(tmp_path: Path) -> None:
    """Two AAC streams one behind the other, the second with two channels: all of it has the channels of the first."""
    one = write_sound(tmp_path / "one.aac", LEFT, 16000, "aac", "adts").read_bytes()
    two = write_sound(tmp_path / "two.aac", np.stack([LEFT, LEFT]), 16000, "aac", "adts").read_bytes()
    for name, data, layout in (("a.aac", one + two, "mono"), ("b.aac", two + one, "stereo")):
        (tmp_path / name).write_bytes(data)
        assert 2.0 < len(load_speech(tmp_path / name)) / 16000 < 2.3
        with AudioTrack(Sound(path=tmp_path / name)) as track:
            frame = track.read(10_000_000)
        assert frame is not None
        assert track.layout == layout
        assert frame.samples > 2.0 * 48000


def test_samples_of_a_kind_that_is_not_read(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.nut", LEFT, 16000, "pcm_s64le", "nut")
    with pytest.raises(InputError, match=r"samples of the kind 's64'.*convert it first"):
        load_speech(path)


def test_reading_takes_little_more_memory_than_the_samples(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(16000)
        second = (8000 * np.sin(np.arange(32000) / 3)).astype("<i2").tobytes()
        for _ in range(300):
            file.writeframes(second)
    load_voice(tmp_path / "a.wav", duration_s=5.0)
    before = psutil.Process().memory_info().rss
    voice = load_voice(tmp_path / "a.wav")
    grown = psutil.Process().memory_info().rss - before
    assert len(voice.samples) == 300 * 16000
    assert grown < 2.2 * voice.samples.nbytes
