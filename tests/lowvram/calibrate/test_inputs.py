"""What a calibration is run on: what is given, and what is drawn and synthesized where nothing is."""

from __future__ import annotations

import hashlib
import logging

import pytest
import torch

from lowvram.calibrate.inputs import FRAMES, PROMPT, calibration_inputs
from lowvram.calibrate.observe import observe
from lowvram.media.samples import draw_portrait, synth_voice, write_wav
from lowvram.pipeline import AvatarPipeline
from lowvram_kernels.errors import OutputError


def test_nothing_given():
    found = calibration_inputs()
    assert found.inputs.portrait.shape == (3, 256, 256)
    assert found.facts["size"] == [256, 256]
    assert (found.facts["image"], found.facts["audio"], found.facts["prompt"]) == (None, None, PROMPT)
    assert found.inputs.voice_frames > FRAMES
    again = calibration_inputs()
    assert torch.equal(found.inputs.portrait, again.inputs.portrait)
    assert (found.inputs.speech == again.inputs.speech).all()


def test_files_are_named_by_their_content(tiny):
    facts = calibration_inputs(image=tiny.portrait, audio=tiny.voice, prompt="She sings", size="128*128").facts
    for part, path in (("image", tiny.portrait), ("audio", tiny.voice)):
        assert facts[part] == {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert (facts["prompt"], facts["size"]) == ("She sings", [128, 128])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (100, 300), (300, 100), (900, 900), (333, 257)])
def test_portraits_of_any_size(tmp_path, caplog, height, width):
    """A smaller one is scaled up without a word of options that ``convert`` does not have."""
    path = tmp_path / "portrait.png"
    draw_portrait(height, width).save(path)
    with caplog.at_level(logging.WARNING):
        found = calibration_inputs(image=path, size="256*256")
    wide, high = found.facts["size"]
    assert 0.4 * 256 * 256 < wide * high <= 256 * 256
    assert (wide > high) == (width > height + 100)
    assert not any("--" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("seconds", [0.5, 5.0])
def test_voices_of_other_lengths_make_the_same_blocks(tiny, tmp_path, seconds):
    write_wav(tmp_path / "voice.wav", synth_voice(seconds), 16000)
    found = calibration_inputs(image=tiny.portrait, audio=tmp_path / "voice.wav", size="128*128")
    blocks = []
    pipeline = AvatarPipeline.from_artifact(tiny.artifact("int8"), device="cpu")
    for block, _ in pipeline.denoise(found.inputs, lambda _rollout, count: blocks.append(count)):
        blocks.append(block.frames)
        break
    assert blocks == [2, 3]


def test_no_room_for_what_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(OutputError, match="set TMPDIR"):
        calibration_inputs()


def test_a_watched_run_says_how_far_it_is(tiny, capsys):
    observe(AvatarPipeline.from_artifact(tiny.artifact("int8"), device="cpu"), tiny.request(num_clip=1))
    assert "2/2 blocks" in capsys.readouterr().err
