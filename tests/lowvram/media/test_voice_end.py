"""The end of the voice: whatever its length, the video has frames for all of it, and the file holds all of it."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from lowvram.media.samples import write_wav
from lowvram.media.video import VideoWriter
from lowvram.schedule import Extent, blocks_of, frames_to_denoise
from lowvram_models.audio_encoder import num_clips
from lowvram_models.constants import DROPPED_FIRST_FRAMES
from tests.lowvram.media.boxes import durations_s, top_level

SAMPLES_A_FRAME = 16_000 // 25
LENGTHS = range(12, 101)


def extent_of(samples: int, infer_frames: int, num_clip: int | None = None) -> tuple[int, int, Extent]:
    """(frames of a voice of so many samples, clips the reference makes of it, what is made)."""
    features = (samples - 400) // 320 + 1  # of wav2vec2, 50 a second
    voice, clips = -(-samples // SAMPLES_A_FRAME), num_clips(features, infer_frames)
    frames = frames_to_denoise(
        voice, clips_in_audio=clips, infer_frames=infer_frames, num_clip=num_clip, dropped=DROPPED_FIRST_FRAMES
    )
    return voice, clips, Extent.of(frames, infer_frames)


def shown(extent: Extent) -> int:
    return 4 * sum(block.frames for block in extent.blocks()) - DROPPED_FIRST_FRAMES


@pytest.mark.parametrize("infer_frames", [12, 16, 24, 32, 48, 80])
def test_there_are_frames_for_every_length(infer_frames: int) -> None:
    lost = 0
    for samples in (n * SAMPLES_A_FRAME + more for n in range(12, 400) for more in (0, 1, 100, 639)):
        voice, clips, extent = extent_of(samples, infer_frames)
        of_reference, made = list(blocks_of(clips, infer_frames // 4)), list(extent.blocks())
        assert made[: len(of_reference)] == of_reference
        assert shown(extent) >= voice
        if clips * infer_frames - DROPPED_FIRST_FRAMES >= voice:
            assert made == of_reference
        else:
            lost += 1
            assert shown(extent) - voice < 12
    assert lost > 10, "no voice of these lengths would have lost its end: the test shows nothing"


def test_clips_that_are_asked_for_are_all_there_is() -> None:
    samples = 48 * SAMPLES_A_FRAME
    assert extent_of(samples, 48)[2] == Extent(clips=1, tail=3, frames_per_clip=12)
    assert extent_of(samples, 48, num_clip=1)[2] == Extent(clips=1, tail=0, frames_per_clip=12)
    assert extent_of(samples, 48, num_clip=2)[2] == Extent(clips=1, tail=3, frames_per_clip=12)
    assert extent_of(96 * SAMPLES_A_FRAME, 48, num_clip=1)[2] == Extent(clips=1, tail=0, frames_per_clip=12)


def test_the_tail_is_the_start_of_one_clip_more() -> None:
    blocks = list(blocks_of(2, 8, tail=5))
    assert [(b.clip, b.slot, b.offset, b.frames, b.first_frame) for b in blocks[6:]] == [
        (2, 0, 0, 3, 16),
        (2, 1, 3, 2, 19),
    ]
    assert [b.last_of_clip for b in blocks] == [False, False, True, False, False, True, False, True]
    assert blocks[:6] == list(blocks_of(2, 8))
    assert [b.index for b in blocks] == list(range(8))


@pytest.mark.parametrize("frames", LENGTHS)
def test_a_file_of_every_length_holds_the_whole_voice(tmp_path: Path, frames: int) -> None:
    # In turn exactly so many frames long, and reaching a little into the last of them.
    samples = frames * SAMPLES_A_FRAME - (0, 600, 320)[frames % 3]
    voice = np.zeros(samples, np.float32)
    beep = np.sin(2 * np.pi * 1000 * np.arange(640) / 16000)
    voice[:640], voice[-640:] = 0.5 * beep, 0.5 * beep
    write_wav(tmp_path / "voice.wav", voice, 16000)
    _, _, extent = extent_of(samples, 48)
    with VideoWriter(tmp_path / "a.mp4", 32, 32, audio_path=tmp_path / "voice.wav") as writer:
        for block in extent.blocks():
            made = 4 * block.frames - (DROPPED_FIRST_FRAMES if block.index == 0 else 0)
            writer.write(np.full((made, 32, 32, 3), 60, np.uint8))
    check_file(tmp_path / "a.mp4", frames, samples / 16000)


def check_file(path: Path, frames: int, seconds: float) -> None:
    """An ordinary MP4 of ``frames`` frames whose sound has a beep in its first and in its last 40 ms."""
    names = [name for name in top_level(path.read_bytes()) if name != "free"]
    assert names == ["ftyp", "moov", "mdat"]
    stated = durations_s(path)
    assert stated["vide"] == pytest.approx(frames / 25, abs=1e-3)
    assert stated["soun"] == pytest.approx(seconds, abs=1e-3)
    assert stated["movie"] == pytest.approx(max(stated["vide"], stated["soun"]), abs=1e-3)
    assert 0 <= stated["vide"] - stated["soun"] < 1 / 25 + 1e-3
    with av.open(str(path)) as container:
        assert (
            container.streams.video[0].frames == sum(1 for packet in container.demux(video=0) if packet.size) == frames
        )
    with av.open(str(path)) as container:
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    end = round(seconds * 48000)
    assert end <= len(sound) <= end + 1024
    power = [float(np.square(sound[at : at + 1920]).mean()) for at in (0, len(sound) // 2, end - 1920)]
    assert power[0] > 0.06
    assert power[2] > 0.06
    assert power[1] < 1e-3
