"""Whole runs whose voice ends where whole clips have no frames left: the video goes on to its end."""

from __future__ import annotations

import itertools
import json

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from lowvram.cli import main
from lowvram.media.samples import write_wav
from lowvram.media.video import probe, read_frames
from tests.lowvram.media.boxes import durations_s, top_level

SAMPLES_A_FRAME = 640


@pytest.fixture
def infer(tiny, tmp_path):
    """Run ``infer`` on a voice of so many frames with a beep in the last one; (report, dumped tensors)."""

    def run(frames: int, *, around: int = 0, **changes) -> tuple[dict, dict[str, torch.Tensor]]:
        beep = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(SAMPLES_A_FRAME) / 16000)
        quiet = 0.01 * np.sin(2 * np.pi * 200 * np.arange((frames - 1) * SAMPLES_A_FRAME) / 16000)
        rest = np.full(around * SAMPLES_A_FRAME, 0.9)  # of a file that is more than the voice
        voice = np.concatenate([rest, quiet, beep, rest]).astype(np.float32)
        write_wav(tmp_path / "voice.wav", voice, 16000)
        options = {
            "model": tiny.artifact("fp32"), "image": tiny.portrait, "audio": tmp_path / "voice.wav", "prompt": "x",
            "out": tmp_path / "a.mp4", "size": "128*128", "infer_frames": 16, "sample_steps": 1, "device": "cpu",
            "report": tmp_path / "a.json", "dump-tensors": tmp_path / "a.safetensors",
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in (options | changes).items()]
        done = CliRunner().invoke(main, ["infer", "-q", "--overwrite", *words])
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / "a.json").read_text()), load_file(tmp_path / "a.safetensors")

    return run


def test_the_last_frames_of_a_clip(infer, tmp_path):
    """Behind the one clip that the reference makes comes a block; the clip is the same with and without it."""
    report, tensors = infer(16)
    holds_the_voice(tmp_path / "a.mp4", report, tensors, frames=16, blocks=[3, 1, 3])
    short, one = infer(16, num_clip=1)
    assert short["frames_written"] == 13
    assert torch.equal(tensors["audio_emb"], one["audio_emb"])
    assert all(torch.equal(tensors[f"latents.block{index}"], one[f"latents.block{index}"]) for index in (0, 1))
    assert torch.equal(tensors["frames"][:, :13], one["frames"])


def test_a_part_of_a_file_behind_the_second_clip_decoding_a_clip_at_a_time(infer, tmp_path):
    part = {"audio_start": "0:00.4", "audio_duration": 1.24, "audio-track": 1, "upscale": "true"}
    report, tensors = infer(31, around=10, enable_online_decode=False, **part)
    holds_the_voice(tmp_path / "a.mp4", report, tensors, frames=31, blocks=[3, 1, 3, 1, 3])
    settings = {name: report["settings"][name] for name in ("audio_start", "audio_duration", "audio_track", "upscale")}
    assert settings == {"audio_start": 0.4, "audio_duration": 1.24, "audio_track": 1, "upscale": True}
    voice = {name: report["voice"][name] for name in ("codec", "track", "seconds", "gain")}
    assert voice == {"codec": "pcm_s16le", "track": 1, "seconds": 1.24, "gain": 1.0}
    assert report["portrait"] == {"format": "PNG", "mode": "RGB", "width": 128, "height": 128}


def holds_the_voice(video, report, tensors, *, frames: int, blocks: list[int]) -> None:
    assert [tensors[f"latents.block{index}"].shape[1] for index in range(len(blocks))] == blocks
    assert report["frames"] == tensors["frames"].shape[1] == 4 * sum(blocks) - 3
    assert (report["frames_written"], report["fragmented"]) == (frames, False)
    found = probe(video)
    assert found["frames"] == frames
    assert found["audio_duration_s"] == pytest.approx(frames / 25, abs=1e-3)
    assert "moof" not in top_level(video.read_bytes())
    assert durations_s(video)["movie"] == pytest.approx(frames / 25, abs=1e-3)
    with av.open(str(video)) as container:
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert 0.4 < np.abs(sound[(frames - 1) * 1920 : frames * 1920]).max() < 0.6
    assert np.abs(sound[: (frames - 2) * 1920]).max() < 0.1
    pictures = np.stack(list(read_frames(video))).astype(int)
    assert all(np.abs(a - b).mean() > 0.2 for a, b in itertools.pairwise(pictures)), "a frame is still"
