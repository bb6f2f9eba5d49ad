"""The finished file: an ordinary MP4 with the same packets, made beside the fragmented one, and full disks there."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from lowvram.media import finish as module
from lowvram.media.finish import finish
from lowvram.media.samples import synth_voice, write_wav
from lowvram.media.video import VideoWriter, probe, read_frames
from tests.lowvram.media.boxes import durations_s, top_level

MakeFrames = Callable[..., np.ndarray]


@pytest.fixture
def fragmented(tmp_path: Path, moving_frames: MakeFrames) -> Path:
    """A whole fragmented file of 61 frames and 2.43 s of sound, as a writer has it just before it finishes."""
    write_wav(tmp_path / "voice.wav", synth_voice(2.43), 16000)
    writer = VideoWriter(tmp_path / "a.mp4", 64, 96, audio_path=tmp_path / "voice.wav")
    writer.write(moving_frames(72))
    writer.abort()
    return writer.partial_path


def packets(path: Path) -> list[tuple]:
    with av.open(str(path)) as container:
        found = [(p.stream.index, p.pts, p.dts, p.is_keyframe, bytes(p)) for p in container.demux() if p.size]
    return sorted(found, key=lambda packet: (packet[0], packet[2]))


def decoded_sound(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)


def test_one_index_in_front_of_the_same_packets(tmp_path: Path, fragmented: Path) -> None:
    before, sound = packets(fragmented), decoded_sound(fragmented)
    assert "moof" in top_level(fragmented.read_bytes())
    assert finish(fragmented, tmp_path / "a.mp4") is True
    names = top_level((tmp_path / "a.mp4").read_bytes())
    assert [name for name in names if name != "free"] == ["ftyp", "moov", "mdat"]
    assert packets(tmp_path / "a.mp4") == before
    assert np.array_equal(decoded_sound(tmp_path / "a.mp4"), sound)
    assert not fragmented.exists()


def test_the_length_is_said_and_both_tracks_agree(tmp_path: Path, fragmented: Path) -> None:
    finish(fragmented, tmp_path / "a.mp4")
    found = durations_s(tmp_path / "a.mp4")
    assert found == pytest.approx({"movie": 61 / 25, "vide": 61 / 25, "soun": 2.43}, abs=1e-3)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.duration == pytest.approx(2.44e6, abs=2e3)
        assert container.streams.video[0].frames == 61
    assert probe(tmp_path / "a.mp4")["frames"] == 61


def test_a_silent_video(tmp_path: Path, moving_frames: MakeFrames) -> None:
    with VideoWriter(tmp_path / "a.mp4", 64, 96) as writer:
        writer.write(moving_frames(13))
    assert writer.fragmented is False
    assert durations_s(tmp_path / "a.mp4") == pytest.approx({"movie": 0.52, "vide": 0.52}, abs=1e-3)


def full(*_arguments: object) -> None:
    raise OSError(28, "No space left on device")


def refused(*_arguments: object) -> None:
    raise av.error.InvalidDataError(1094995529, "Invalid data found when processing input")


@pytest.mark.parametrize(("failure", "words"), [(full, "disk is full"), (refused, "Invalid data")])
def test_what_cannot_be_copied_keeps_its_fragments_and_gets_its_name(
    tmp_path: Path,
    fragmented: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: Callable,
    words: str,
) -> None:
    def half(source: Path, target: Path) -> None:
        target.write_bytes(b"half of it")
        failure()

    monkeypatch.setattr(module, "_copy", half)
    before = fragmented.read_bytes()
    with caplog.at_level(logging.WARNING):
        assert finish(fragmented, tmp_path / "a.mp4") is False
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "voice.wav"]
    assert words in caplog.text
    assert "fragmented" in caplog.text


def test_a_disk_that_is_full_while_the_writer_finishes(tmp_path: Path, moving_frames: MakeFrames) -> None:
    """No file may grow beyond what the fragmented one has by now: the copy, which gets its index moved, cannot."""
    script = f"""
        import os, resource, signal
        import numpy as np
        from lowvram.media import finish as module
        from lowvram.media.video import VideoWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        copy = module._copy
        def limited(source, target):
            resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(source) // 2, resource.RLIM_INFINITY))
            copy(source, target)
        module._copy = limited
        writer = VideoWriter({str(tmp_path / "a.mp4")!r}, 64, 96)
        writer.write(np.random.default_rng(0).integers(0, 256, (30, 64, 96, 3), dtype=np.uint8))
        writer.close()
        assert writer.fragmented
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], timeout=60, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "stays a fragmented MP4: the disk is full" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert len(list(read_frames(tmp_path / "a.mp4"))) == 30


def test_killed_while_it_finishes(tmp_path: Path) -> None:
    script = f"""
        import os, signal
        import numpy as np
        from lowvram.media import finish as module
        from lowvram.media.video import VideoWriter
        module.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        with VideoWriter({str(tmp_path / "a.mp4")!r}, 64, 96) as writer:
            writer.write(np.zeros((30, 64, 96, 3), np.uint8))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(read_frames(tmp_path / "a.partial.mp4"))) == 30
    assert not (tmp_path / "a.mp4").exists()


def test_interrupted_while_it_finishes(tmp_path: Path, fragmented: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: Path, target: Path) -> None:
        target.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finish(fragmented, tmp_path / "a.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.partial.mp4", "voice.wav"]


def test_other_files_beside_it_stay(tmp_path: Path, fragmented: Path) -> None:
    for name in ("a.finishing.mp4", "a.finishing1.mp4"):
        (tmp_path / name).write_bytes(b"of a run that was killed")
    os.symlink(tmp_path / "nowhere", tmp_path / "a.finishing2.mp4")
    assert finish(fragmented, tmp_path / "a.mp4") is True
    assert (tmp_path / "a.finishing.mp4").read_bytes() == b"of a run that was killed"
    assert sorted(path.name for path in tmp_path.glob("a.*")) == [
        "a.finishing.mp4",
        "a.finishing1.mp4",
        "a.finishing2.mp4",
        "a.mp4",
    ]
