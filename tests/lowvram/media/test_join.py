"""Segments of a take, and what is joined of them: pictures, sound over the borders, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import av
import numpy as np
import pytest
from click.testing import CliRunner

from lowvram.cli import main
from lowvram.media.join import join, read_part
from lowvram.media.samples import write_wav
from lowvram.media.segment import KEY, Segment, SegmentFacts
from lowvram.media.sound import Sound
from lowvram.media.video import VideoWriter, probe
from lowvram_kernels.errors import ConfigError, InputError
from tests.lowvram.media.boxes import durations_s, top_level
from tests.lowvram.media.sounds import write_sound

SIDE, FPS, RATE = 64, 25, 48_000


def frames(begin: int, end: int) -> np.ndarray:
    """Frames of a take [k, 64, 64, 3]: dark, and light where a second begins."""
    made = np.full((end - begin, SIDE, SIDE, 3), 20, np.uint8)
    made[-begin % FPS :: FPS] = 220
    return made


def tone(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    times = np.arange(round(seconds * rate)) / rate
    return np.stack([0.4 * np.sin(2 * np.pi * hz * times) for hz in (440, 700)[:channels]]).astype(np.float32)


def write_segments(
    folder: Path, cuts: list[int], audio: Path | Sound | None, *, take: str = "a take", **settings
) -> list[Path]:
    """Files of the frames between adjacent ``cuts``."""
    paths = []
    for begin, end in itertools.pairwise(cuts):
        paths.append(folder / f"{begin:05}.mp4")
        segment = Segment(take=take, first_frame=begin)
        with VideoWriter(paths[-1], SIDE, SIDE, audio_path=audio, segment=segment, **settings) as writer:
            writer.goes_on = end != cuts[-1]
            for first in range(begin, end, 500):
                writer.write(frames(first, min(end, first + 500)))
    return paths


def write_whole(path: Path, count: int, audio: Path | Sound | None, **settings) -> Path:
    with VideoWriter(path, SIDE, SIDE, audio_path=audio, **settings) as writer:
        writer.write(frames(0, count))
    return path


def sound_of(path: Path) -> tuple[float, np.ndarray]:
    """Where the first sample is heard, in s, and all of them [channels, n] at 48 kHz; none are missing between."""
    with av.open(str(path)) as container:
        found = [(frame.pts, frame.to_ndarray()) for frame in container.decode(audio=0)]
    for (at, samples), (behind, _) in itertools.pairwise(found):
        assert at + samples.shape[1] == behind
    return found[0][0] / RATE, np.concatenate([samples for _, samples in found], axis=1)


def times_of(path: Path) -> tuple[list[int], list[int]]:
    """Times of the pictures, in frames, in the order of showing; and of decoding, as they come."""
    with av.open(str(path)) as container:
        unit = 1 / (container.streams.video[0].time_base * FPS)
        packets = [packet for packet in container.demux(video=0) if packet.size]
    return sorted(packet.pts // unit for packet in packets), [packet.dts // unit for packet in packets]


def numbers_of(path: Path) -> list[int]:
    """Which frames of a second are light, in the order of showing."""
    with av.open(str(path)) as container:
        luma = [np.frombuffer(frame.planes[0], np.uint8)[SIDE // 2] for frame in container.decode(video=0)]
    return [number for number, light in enumerate(luma) if light > 120]


@pytest.mark.parametrize(
    ("cuts", "rate", "channels", "seconds"),
    [
        ([0, 8, 40, 75], 48_000, 1, 3.0),
        ([0, 7, 50, 51, 53, 75], 44_100, 2, 3.0),
        ([0, 13, 61], 44_100, 1, 9.0),  # the voice goes on behind the video
        ([0, 1, 2, 3, 64], 16_000, 2, 3.0),
        ([0, 75], 48_000, 2, 3.0),
        ([0, 37, 74], 8_000, 1, 2.95),  # and ends in its last frame
    ],
)
def test_joined_is_what_is_made_at_once(tmp_path, cuts, rate, channels, seconds):
    audio = write_sound(tmp_path / "a.wav", tone(seconds, rate, channels), rate, "pcm_s16le", "wav")
    parts = write_segments(tmp_path, cuts, audio)
    assert join(parts, tmp_path / "joined.mp4") == cuts[-1]
    whole = write_whole(tmp_path / "whole.mp4", cuts[-1], audio)
    assert probe(tmp_path / "joined.mp4") == pytest.approx(probe(whole), abs=1e-4)
    assert durations_s(tmp_path / "joined.mp4") == pytest.approx(durations_s(whole), abs=2e-3)
    assert [name for name in top_level((tmp_path / "joined.mp4").read_bytes()) if name != "free"] == [
        "ftyp", "moov", "mdat",
    ]  # fmt: skip
    shown, decoded = times_of(tmp_path / "joined.mp4")
    assert shown == list(range(cuts[-1]))
    assert all(later == before + 1 for before, later in itertools.pairwise(decoded))
    assert numbers_of(tmp_path / "joined.mp4") == list(range(0, cuts[-1], FPS))
    (begin_s, joined), (whole_begin_s, at_once) = sound_of(tmp_path / "joined.mp4"), sound_of(whole)
    assert (begin_s, joined.shape) == (whole_begin_s, at_once.shape)
    # Of a sine the codec makes little noise: what the borders do stands out. A click would be as loud as the sine.
    expected = np.concatenate([tone(seconds, RATE, channels), np.zeros((channels, RATE), np.float32)], axis=1)
    inside = np.s_[:, RATE // 10 : min(round(seconds * RATE), cuts[-1] * RATE // FPS) - 2048]
    errors, usual = (np.abs(each - expected[:, : each.shape[1]])[inside].max() for each in (joined, at_once))
    assert errors < max(1.5 * usual, 0.005)


@pytest.mark.parametrize("cut", [8, 9, 12, 15, 31])
def test_a_segment_alone_is_in_step(tmp_path, cut):
    clicks = np.zeros(3 * 16_000, np.float32)
    clicks[16_000::16_000] = 0.9
    write_wav(tmp_path / "a.wav", clicks, 16_000)
    part = write_segments(tmp_path, [0, cut, 70], tmp_path / "a.wav")[1]
    facts = probe(part)
    assert facts["frames"] == 70 - cut
    assert facts["audio_duration_s"] == pytest.approx((70 - cut) / FPS, abs=1e-3)
    begin_s, samples = sound_of(part)
    heard = begin_s + np.flatnonzero(np.abs(samples[0]) > 0.3)[0] / RATE
    flash = numbers_of(part)[0] / FPS
    assert heard == pytest.approx(flash, abs=0.005)
    assert flash == pytest.approx((-cut % FPS) / FPS)


def test_a_part_of_a_file_is_the_take(tmp_path):
    """A voice from the middle of a recording, of one channel, louder: the same in segments."""
    audio = write_sound(tmp_path / "a.flac", tone(6.0, 44_100, 2), 44_100, "flac", "flac")
    chosen = Sound(path=audio, channel=1, gain=1.5, start_s=1.25, duration_s=2.5)
    parts = write_segments(tmp_path, [0, 11, 40, 63], chosen)
    assert join(parts, tmp_path / "joined.mp4") == 63
    whole = write_whole(tmp_path / "whole.mp4", 63, chosen)
    (_, joined), (_, at_once) = sound_of(tmp_path / "joined.mp4"), sound_of(whole)
    assert joined.shape == at_once.shape
    expected = 0.6 * np.sin(2 * np.pi * 700 * (1.25 + np.arange(joined.shape[1]) / RATE))
    errors, usual = (np.abs(each[0] - expected)[4800:-2048].max() for each in (joined, at_once))
    assert errors < 1.5 * usual < 0.05


def test_a_silent_take(tmp_path):
    parts = write_segments(tmp_path, [0, 10, 35, 36], None)
    assert join(parts, tmp_path / "joined.mp4") == 36
    assert probe(tmp_path / "joined.mp4")["has_audio"] is False
    assert times_of(tmp_path / "joined.mp4")[0] == list(range(36))


@pytest.mark.parametrize("seconds", [0.7, 0.8, 1.2, 1.6, 1.99])
def test_sound_that_ends_before_the_picture(tmp_path, seconds):
    audio = write_sound(tmp_path / "a.wav", tone(seconds, 48_000), 48_000, "pcm_s16le", "wav")
    parts = write_segments(tmp_path, [0, 20, 40, 60], audio, trim_to_audio=False)
    assert [probe(part)["has_audio"] for part in parts] == [True, seconds > 0.8, seconds > 1.6]
    assert join(parts, tmp_path / "joined.mp4") == 60
    found = probe(tmp_path / "joined.mp4")
    assert found["frames"] == 60
    assert found["audio_duration_s"] == pytest.approx(seconds, abs=1e-3)


def test_frames_past_the_sound_are_dropped_in_the_last_segment(tmp_path):
    audio = write_sound(tmp_path / "a.wav", tone(1.5, 44_100), 44_100, "pcm_s16le", "wav")
    parts = write_segments(tmp_path, [0, 20, 48], audio)
    assert read_part(parts[1]).frames == 18
    assert join(parts, tmp_path / "joined.mp4") == 38


@pytest.mark.parametrize(
    ("seconds", "goes_on"), [(0.8, False), (0.79, False), (0.8005, True), (0.84, True), (3.0, True)]
)
def test_a_take_that_trims_to_its_sound_ends_with_it(tmp_path, seconds, goes_on):
    """Whoever cuts it cannot know that no frame behind the border will be kept."""
    audio = write_sound(tmp_path / "a.wav", tone(seconds, 48_000), 48_000, "pcm_s16le", "wav")
    parts = write_segments(tmp_path, [0, 10, 20, 20 + FPS], audio) if goes_on else None
    if parts is None:
        parts = write_segments(tmp_path, [0, 10, 20], audio)[:1]
        segment = Segment(take="a take", first_frame=10)
        with VideoWriter(tmp_path / "last.mp4", SIDE, SIDE, audio_path=audio, segment=segment) as writer:
            writer.write(frames(10, 20))
            writer.goes_on = True
        parts.append(tmp_path / "last.mp4")
    assert [read_part(part).facts.goes_on for part in parts] == ([True, True, False] if goes_on else [True, False])
    assert join(parts, tmp_path / "joined.mp4") == -(-round(min(seconds, 1.8) * 48_000) // 1920)


@pytest.mark.slow
def test_long_takes_stay_in_step(tmp_path):
    """A flash and a click every second, in segments of uneven lengths: every click within 10 ms of its flash."""
    seconds, rate = 600, 8_000
    clicks = np.zeros(seconds * rate, np.float32)
    clicks.reshape(seconds, rate)[:, :16] = 0.9
    write_wav(tmp_path / "a.wav", clicks, rate)
    cuts = [round(seconds * FPS * share) for share in (0, 0.1001, 0.2963, 0.3, 0.6002, 0.8231, 1)]
    parts = write_segments(tmp_path, cuts, tmp_path / "a.wav")
    assert join(parts, tmp_path / "joined.mp4") == seconds * FPS
    assert times_of(tmp_path / "joined.mp4")[0] == list(range(seconds * FPS))
    flashes = np.array(numbers_of(tmp_path / "joined.mp4")) / FPS
    begin_s, samples = sound_of(tmp_path / "joined.mp4")
    loud = np.flatnonzero(np.abs(samples[0]) > 0.3)
    heard = begin_s + loud[np.flatnonzero(np.diff(loud, prepend=-RATE) > RATE // 2)] / RATE
    assert len(heard) == len(flashes) == seconds
    assert np.abs(heard - flashes).max() < 0.010


@pytest.fixture(scope="module")
def take(tmp_path_factory) -> list[Path]:
    """Three segments of 10, 15 and 10 frames, with sound."""
    folder = tmp_path_factory.mktemp("take")
    audio = write_sound(folder / "a.wav", tone(2.0, 16_000), 16_000, "pcm_s16le", "wav")
    return write_segments(folder, [0, 10, 25, 35], audio)


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ([1, 2], ["begins with frame 10", "a take begins at frame 0", "10 frames are missing"]),
        ([0, 2], ["begins with frame 25", "ends at frame 10", "15 frames are missing"]),
        ([0, 1], ["goes on behind", "frame 25", "--unfinished"]),
        ([0, 1, 1, 2], ["would be there twice"]),
        ([2, 1, 0], ["not given in their order", "00000.mp4 00010.mp4 00025.mp4"]),
        ([0, 0], ["would be there twice"]),
    ],
)
def test_segments_that_do_not_follow(take, tmp_path, order, words):
    result = run(*(take[place] for place in order), "--out", tmp_path / "a.mp4")
    assert result.exit_code == 2
    assert all(word in result.stderr for word in words), result.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_there_of_an_unfinished_take(take, tmp_path):
    result = run(take[0], take[1], "--out", tmp_path / "a.mp4", "--unfinished")
    assert result.exit_code == 0, result.output
    assert probe(tmp_path / "a.mp4")["frames"] == 25


def other_take(folder: Path, take: list[Path]) -> Path:
    return write_segments(folder, [10, 35], None, take="another")[0]


def another_size(folder: Path, take: list[Path]) -> Path:
    segment = Segment(take="a take", first_frame=10)
    with VideoWriter(folder / "a.mp4", 32, SIDE, segment=segment) as writer:
        writer.write(np.zeros((25, 32, SIDE, 3), np.uint8))
    return folder / "a.mp4"


def another_voice(folder: Path, take: list[Path]) -> Path:
    audio = write_sound(folder / "b.wav", tone(2.0, 16_000, 2), 16_000, "pcm_s16le", "wav")
    return write_segments(folder, [10, 35], audio)[0]


def no_segment(folder: Path, take: list[Path]) -> Path:
    return write_whole(folder / "a.mp4", 25, None)


def cut(folder: Path, take: list[Path]) -> Path:
    data = take[1].read_bytes()
    (folder / "a.mp4").write_bytes(data[: len(data) * 3 // 4])
    return folder / "a.mp4"


def text(folder: Path, take: list[Path]) -> Path:
    (folder / "a.mp4").write_text("no video")
    return folder / "a.mp4"


def nothing(folder: Path, take: list[Path]) -> Path:
    return folder / "a.mp4"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (other_take, "of another take"),
        (another_size, "coded differently"),
        (another_voice, "coded differently"),
        (no_segment, "does not say what it is a segment of"),
        (cut, "is damaged"),
        (text, "cannot be read"),
        (nothing, "is not a file"),
    ],
)
def test_files_that_are_refused(take, tmp_path, make, words):
    (tmp_path / "in").mkdir()
    other = make(tmp_path / "in", take)
    (tmp_path / "out").mkdir()
    result = run(take[0], other, "--out", tmp_path / "out" / "a.mp4", "--unfinished")
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert str(other) in result.stderr
    assert not list((tmp_path / "out").iterdir())


def test_places_to_write(take, tmp_path):
    assert "both" in run(*take, "--out", take[1]).stderr
    (tmp_path / "a.mp4").write_bytes(b"older")
    assert "--overwrite" in run(*take, "--out", tmp_path / "a.mp4").stderr
    assert (tmp_path / "a.mp4").read_bytes() == b"older"
    result = run(*take, "--out", tmp_path / "a.mp4", "--overwrite")
    assert (result.exit_code, result.stdout.strip()) == (0, str(tmp_path / "a.mp4"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_facts_of_a_segment(take):
    found = [read_part(path).facts for path in take]
    assert [(facts.first_frame, facts.frames, facts.goes_on) for facts in found] == [
        (0, 10, True), (10, 15, True), (25, 10, False),
    ]  # fmt: skip
    assert [(facts.sound_begin, facts.sound_end) for facts in found] == [(0, 19200), (19200, 48000), (48000, 67200)]
    assert {(facts.take, facts.fps, facts.rate_hz) for facts in found} == {("a take", 25, 48_000)}


def test_a_segment_that_stays_fragmented_can_be_joined(take, tmp_path, monkeypatch, caplog):
    def full(*_arguments, **_more):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lowvram.media.finish._copy", full)
        first = write_segments(tmp_path, [0, 10], take[0].parent / "a.wav")[0]
    assert "moof" in top_level(first.read_bytes())
    assert join([first, *take[1:]], tmp_path / "joined.mp4") == 35
    assert probe(tmp_path / "joined.mp4")["audio_duration_s"] == pytest.approx(1.4, abs=1e-3)


@pytest.mark.parametrize(
    "written",
    [
        "", "{}", "[]", "3", '{"version": 1}', '{"version": 2, "take": "a", "first_frame": 0, "fps": 25, "rate_hz": 1}',
        '{"version": 1, "take": "a", "first_frame": -1, "fps": 25, "rate_hz": 48000}',
        '{"version": 1, "take": "a", "first_frame": 0, "fps": 0, "rate_hz": 48000}',
        '{"version": 1, "take": "a", "first_frame": 0, "fps": 25, "rate_hz": 48000, "frames": "x"}',
        '{"version": 1, "take": "a", "first_frame": 0, "fps": 25, "rate_hz": 48000, "more": 1}',
    ],
)  # fmt: skip
def test_facts_that_nobody_wrote(written):
    assert SegmentFacts.from_metadata({KEY: written}) is None


def test_segments_that_cannot_be(tmp_path):
    for settings in ({"take": ""}, {"take": "a", "first_frame": -1}):
        with pytest.raises(ConfigError, match="expected a name"):
            Segment(**settings)
    audio = write_sound(tmp_path / "a.wav", tone(1.0, 16_000), 16_000, "pcm_s16le", "wav")
    with pytest.raises(Exception, match="no frame was written"):
        write_segments(tmp_path, [25, 40], audio)  # all of it lies behind the sound
    with pytest.raises(InputError, match="does not say"):
        join([write_whole(tmp_path / "b.mp4", 5, None)], tmp_path / "c.mp4")


def run(*arguments):
    return CliRunner().invoke(main, ["join", *map(str, arguments)])
