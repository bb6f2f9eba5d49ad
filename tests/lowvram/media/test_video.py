"""The writer: counts, colours, sound, fragments, cuts, kills, full disks, memory; and the reader."""

import gc
import itertools
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from lowvram.media.samples import synth_voice, write_wav
from lowvram.media.video import VideoWriter, probe, read_frames
from lowvram_kernels.errors import InputError, OutputError
from tests.lowvram.media.boxes import top_level

MakeFrames = Callable[..., np.ndarray]


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    """3.0 s of speech-like sound."""
    write_wav(tmp_path / "voice.wav", synth_voice(3.0), 16000)
    return tmp_path / "voice.wav"


def write_blocks(path: Path, block: np.ndarray, count: int) -> None:
    with VideoWriter(path, 64, 96) as writer:
        for _ in range(count):
            writer.write(block)


def test_frames_and_sound_after_close(tmp_path: Path, voice: Path, moving_frames: MakeFrames) -> None:
    frames = moving_frames(50)
    with VideoWriter(tmp_path / "a.mp4", 64, 96, audio_path=voice) as writer:
        for start in range(0, 50, 12):
            writer.write(frames[start : start + 12])
        assert writer.partial_path.exists()
        assert not writer.path.exists()
    assert (writer.frames_written, writer.frames_dropped) == (50, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "voice.wav"]
    found = probe(tmp_path / "a.mp4")
    assert found.pop("audio_duration_s") == pytest.approx(2.0, abs=1e-3)  # sound ends where the video ends
    assert found == {"frames": 50, "width": 96, "height": 64, "fps": 25.0, "duration_s": 2.0, "has_audio": True}


def test_colours_and_order_survive(tmp_path: Path, moving_frames: MakeFrames) -> None:
    frames = moving_frames(30)
    with VideoWriter(tmp_path / "a.mp4", 64, 96) as writer:
        writer.write(frames)
    read = list(read_frames(tmp_path / "a.mp4"))
    assert len(read) == 30
    assert (read[0].dtype, read[0].shape) == (np.uint8, (64, 96, 3))
    for made, wanted in zip(read, frames, strict=True):
        assert np.abs(made.astype(int) - wanted).mean() < 6
    inside = np.s_[8:24, 20:40]
    assert np.abs(read[0][inside].astype(int) - (220, 20, 30)).max() < 10
    assert probe(tmp_path / "a.mp4")["has_audio"] is False


def test_sound_is_in_step_with_the_picture(tmp_path: Path, moving_frames: MakeFrames) -> None:
    click = np.zeros(32000, np.float32)
    click[16000:16160] = 0.8  # at 1.0 s, frame 25
    write_wav(tmp_path / "click.wav", click, 16000)
    with VideoWriter(tmp_path / "a.mp4", 64, 96, audio_path=tmp_path / "click.wav") as writer:
        writer.write(moving_frames(50))
    with av.open(str(tmp_path / "a.mp4")) as container:
        times = [(float(f.time), f.to_ndarray()[0]) for f in container.decode(audio=0)]
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert [float(f.time) for f in container.decode(video=0)] == pytest.approx(
            [i / 25 for i in range(50)], abs=1e-3
        )
    start_s, sound = times[0][0], np.concatenate([samples for _, samples in times])
    assert start_s + float(np.argmax(np.abs(sound) > 0.4)) / 48000 == pytest.approx(1.0, abs=0.005)


@pytest.mark.parametrize(("seconds", "kept"), [(1.0, 25), (1.01, 26), (0.999, 25)])
def test_frames_past_the_sound_are_dropped(
    tmp_path: Path, moving_frames: MakeFrames, seconds: float, kept: int
) -> None:
    write_wav(tmp_path / "short.wav", synth_voice(seconds), 16000)
    with VideoWriter(tmp_path / "a.mp4", 64, 96, audio_path=tmp_path / "short.wav") as writer:
        for block in np.array_split(moving_frames(48), 4):
            writer.write(block)
    assert (writer.frames_written, writer.frames_dropped) == (kept, 48 - kept)
    assert probe(tmp_path / "a.mp4")["frames"] == kept
    assert probe(tmp_path / "a.mp4")["audio_duration_s"] == pytest.approx(seconds, abs=1e-3)


def test_frames_past_the_sound_are_kept_on_request(tmp_path: Path, moving_frames: MakeFrames) -> None:
    write_wav(tmp_path / "short.wav", synth_voice(1.0), 16000)
    writer = VideoWriter(tmp_path / "a.mp4", 64, 96, audio_path=tmp_path / "short.wav", trim_to_audio=False)
    with writer:
        writer.write(moving_frames(100))
    assert (writer.frames_written, writer.frames_dropped) == (100, 0)
    found = probe(tmp_path / "a.mp4")
    assert found["frames"] == 100
    assert found["audio_duration_s"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("rate", "suffix"), [(44100, ".m4a"), (22050, ".mp3"), (8000, ".flac"), (48000, ".opus")])
def test_stereo_sound_of_any_kind(
    tmp_path: Path, tone: MakeFrames, encode_sound: Callable, moving_frames: MakeFrames, rate: int, suffix: str
) -> None:
    path = encode_sound(tmp_path / f"a{suffix}", np.stack([tone(1.0, rate), tone(1.0, rate, 700.0)]), rate)
    with VideoWriter(tmp_path / "a.mp4", 64, 96, audio_path=path) as writer:
        writer.write(moving_frames(20))
    with av.open(str(tmp_path / "a.mp4")) as container:
        sound = np.concatenate([f.to_ndarray() for f in container.decode(audio=0)], axis=1)
    assert len(sound) == 2
    strongest = [np.argmax(np.abs(np.fft.rfft(channel[4800:28800]))) * 2 for channel in sound]
    assert strongest == [440, 700]


def test_file_is_fragmented_with_a_key_frame_a_second(tmp_path: Path, voice: Path, moving_frames: MakeFrames) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 64, 96, audio_path=voice)
    writer.write(moving_frames(75))
    writer.abort()
    names = top_level(writer.partial_path.read_bytes())
    assert names[:2] == ["ftyp", "moov"]
    assert names.count("moof") == names.count("mdat") >= 5
    with av.open(str(writer.partial_path)) as container:
        keys = [round(float(p.pts * p.time_base) * 25) for p in container.demux(video=0) if p.size and p.is_keyframe]
    assert keys[0] == 0
    assert max(np.diff([*keys, 75])) <= 25


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_cut_copy_plays(tmp_path: Path, voice: Path, moving_frames: MakeFrames, share: float) -> None:
    frames = moving_frames(75)
    writer = VideoWriter(tmp_path / "a.mp4", 64, 96, audio_path=voice)
    writer.write(frames)
    writer.abort()
    whole = writer.partial_path.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: int(len(whole) * share)])
    read = list(read_frames(tmp_path / "cut.mp4"))
    assert 75 * share - 25 < len(read) < 75
    assert np.abs(read[5].astype(int) - frames[5]).mean() < 6


def test_blocks_reach_the_disk_while_writing(tmp_path: Path, moving_frames: MakeFrames) -> None:
    with VideoWriter(tmp_path / "a.mp4", 64, 96) as writer:
        on_disk = []
        for block in np.array_split(moving_frames(96), 8):
            writer.write(block)
            on_disk.append(writer.partial_path.stat().st_size)
        assert all(later > earlier for earlier, later in itertools.pairwise(on_disk[2:]))
        assert len(list(read_frames(writer.partial_path))) >= 96 - 36


def test_a_killed_writer_leaves_a_playable_file(tmp_path: Path, voice: Path) -> None:
    script = f"""
        import os, signal
        import numpy as np
        from lowvram.media.video import VideoWriter
        writer = VideoWriter({str(tmp_path / "a.mp4")!r}, 64, 96, audio_path={str(voice)!r})
        for block in range(5):
            writer.write(np.full((12, 64, 96, 3), 40 * block, np.uint8))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "a.mp4").exists()
    frames = list(read_frames(tmp_path / "a.partial.mp4"))
    assert len(frames) >= 24
    assert abs(int(frames[20].mean()) - 40) < 4
    assert probe(tmp_path / "a.partial.mp4")["audio_duration_s"] > 0.9


def test_an_exception_leaves_a_whole_partial_file(
    tmp_path: Path, voice: Path, moving_frames: MakeFrames, caplog: pytest.LogCaptureFixture
) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 64, 96, audio_path=voice)

    def interrupted() -> None:
        with writer:
            writer.write(moving_frames(20))
            raise RuntimeError("stop")

    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert not writer.path.exists()
    assert len(list(read_frames(writer.partial_path))) == 20
    assert str(writer.partial_path) in caplog.text


def test_an_older_video_is_replaced_only_on_success(tmp_path: Path, moving_frames: MakeFrames) -> None:
    (tmp_path / "a.mp4").write_bytes(b"older")
    writer = VideoWriter(tmp_path / "a.mp4", 64, 96)
    writer.write(moving_frames(5))
    writer.abort()
    assert (tmp_path / "a.mp4").read_bytes() == b"older"
    with VideoWriter(tmp_path / "a.mp4", 64, 96) as writer:
        writer.write(moving_frames(5))
    assert probe(tmp_path / "a.mp4")["frames"] == 5
    assert not writer.partial_path.exists()


def test_no_frames_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no frame"):
        VideoWriter(tmp_path / "a.mp4", 64, 96).close()
    assert not (tmp_path / "a.mp4").exists()


def test_bad_targets(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        VideoWriter(tmp_path / "none" / "a.mp4", 64, 96)
    with pytest.raises(InputError, match=r"expected \.mp4"):
        VideoWriter(tmp_path / "a.avi", 64, 96)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        VideoWriter(tmp_path / "folder.mp4", 64, 96)
    with pytest.raises(InputError, match="audio"):
        VideoWriter(tmp_path / "a.mp4", 64, 96, audio_path=tmp_path / "none.wav")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.mp4"]


def test_a_partial_name_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "a.partial.mp4").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        VideoWriter(tmp_path / "a.mp4", 64, 96)


@pytest.mark.parametrize(("height", "width"), [(63, 96), (64, 97), (0, 96)])
def test_odd_sizes(tmp_path: Path, height: int, width: int) -> None:
    with pytest.raises(ValueError, match="even height and width"):
        VideoWriter(tmp_path / "a.mp4", height, width)


@pytest.mark.parametrize("shape", [(2, 64, 64, 3), (64, 96, 3), (2, 3, 64, 96), (2, 64, 96, 4)])
def test_frames_of_another_shape(tmp_path: Path, moving_frames: MakeFrames, shape: tuple[int, ...]) -> None:
    with VideoWriter(tmp_path / "a.mp4", 64, 96) as writer:
        with pytest.raises(ValueError, match="expected frames uint8"):
            writer.write(np.zeros(shape, np.uint8))
        with pytest.raises(ValueError, match="float32"):
            writer.write(np.zeros((1, 64, 96, 3), np.float32))
        writer.write(moving_frames(1))
    with pytest.raises(ValueError, match="is closed"):
        writer.write(moving_frames(1))


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Let no file of this process grow beyond so many bytes: writes then fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_that_cannot_grow(tmp_path: Path, file_size_limit: Callable[[int], None]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 96, 3), dtype=np.uint8)
    file_size_limit(60_000)
    with pytest.raises(OutputError, match="free some space"):
        write_blocks(tmp_path / "a.mp4", noise, 20)
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path, moving_frames: MakeFrames) -> None:
    (tmp_path / "a.partial.mp4").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"No space left.*free some space"):
        write_blocks(tmp_path / "a.mp4", moving_frames(12), 5)
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_length(tmp_path: Path, moving_frames: MakeFrames) -> None:
    write_wav(tmp_path / "long.wav", synth_voice(25.0), 16000)
    block, process, resident = moving_frames(20, 128, 192), psutil.Process(), []
    with VideoWriter(tmp_path / "a.mp4", 128, 192, audio_path=tmp_path / "long.wav") as writer:
        for _ in range(30):
            writer.write(block)
            gc.collect()
            resident.append(process.memory_info().rss)
    raw_bytes_after_warm_up = 400 * 128 * 192 * 3  # 29 MB, were frames kept
    assert writer.frames_written == 600
    assert max(resident[10:]) - resident[9] < raw_bytes_after_warm_up / 10


def test_probe_and_read_errors(tmp_path: Path, voice: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    for path, reason in [(tmp_path / "none.mp4", "not a file"), (tmp_path / "text.mp4", "cannot be read")]:
        with pytest.raises(InputError, match=reason):
            probe(path)
        with pytest.raises(InputError, match=reason):
            list(read_frames(path))
    with pytest.raises(InputError, match="cannot be read"):
        probe(voice)  # a WAV is not a container of videos


def test_sound_without_a_picture(tmp_path: Path, tone: MakeFrames, encode_sound: Callable) -> None:
    with pytest.raises(InputError, match="no picture"):
        probe(encode_sound(tmp_path / "a.m4a", tone(1.0, 16000), 16000))
