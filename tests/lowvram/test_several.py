"""Several people in one picture, and poses that are followed: from files to latents."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lowvram.commands.shared_options import place_of_video
from lowvram.encode import voice as voices_module
from lowvram.encode.voice import SeveralVoices, WholeVoice, together
from lowvram.infer import infer
from lowvram.media.pose import pose_clips
from lowvram.media.reading import probe
from lowvram.media.samples import draw_portrait, synth_voice, write_wav
from lowvram.media.several import MixedTrack, joined, names_of, read_group, token_masks
from lowvram.media.sound import Sound
from lowvram.media.video import VideoWriter
from lowvram.outputs import Outputs
from lowvram.pipeline import AvatarPipeline, Request, read_inputs
from lowvram.recorder import TensorRecorder
from lowvram_kernels.errors import InputError

SIDE = 128
TOKENS = (SIDE // 16) ** 2


@pytest.fixture(scope="module")
def files(tiny) -> dict[str, Path]:
    """Voices, portraits and masks; left and right are halves."""
    made = {name: tiny.root / name for name in ("other.wav", "longer.wav", "second.png", "left.png", "right.png")}
    write_wav(made["other.wav"], synth_voice(1.5)[::-1].copy(), 16000)
    write_wav(made["longer.wav"], synth_voice(3.0), 16000)
    draw_portrait(SIDE, SIDE).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(made["second.png"])
    for name, box in (("left.png", (0, 0, 63, 127)), ("right.png", (64, 0, 127, 127))):
        mask = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(mask).rectangle(box, fill=255)
        mask.save(made[name])
    return made


def both(*paths: Path) -> Path:
    return Path("+".join(str(path) for path in paths))


def tensors_of(tiny, request: Request) -> dict[str, torch.Tensor]:
    pipeline, recorder = AvatarPipeline.from_artifact(tiny.artifact("fp32"), device="cpu"), TensorRecorder()
    for _ in pipeline.stream(request, recorder=recorder):
        pass
    return recorder.tensors()


@pytest.fixture(scope="module")
def one(tiny) -> dict[str, torch.Tensor]:
    return tensors_of(tiny, tiny.request())


NAMES = {
    "a.wav": ["a.wav"],
    "a.wav+b.wav": ["a.wav", "b.wav"],
    "x/a.wav+y/b.mp3+c.m4a": ["x/a.wav", "y/b.mp3", "c.m4a"],
    "rock+roll.wav": ["rock+roll.wav"],  # "rock" has no ending, so that it is no file's name
    "a.wav+": ["a.wav+"],
    "+": ["+"],
}


@pytest.mark.parametrize("given", NAMES)
def test_files_that_are_meant(given):
    assert [str(path) for path in names_of(Path(given))] == NAMES[given]


def test_a_file_that_is_called_like_two_is_one(tmp_path):
    path = tmp_path / "a.wav+b.wav"
    path.touch()
    assert names_of(path) == (path,)


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b"], ["c++/a.wav", "c++/b.wav"], ["rock+roll.wav", "b.wav"], ["x.y+z/a", "x.y+z/b"],
        ["a+b.wav", "b+c.wav", "+"], ["a.wav", "a.wav"],
    ],
    ids=str,
)  # fmt: skip
def test_files_that_are_there_are_found_whatever_they_are_called(tmp_path, names):
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert names_of(joined(paths)) == tuple(paths)


def test_two_equal_voices_are_one(tiny, one):
    """Each is heard in a half, and they share the picture."""
    two = tensors_of(tiny, tiny.request(audio=both(tiny.voice, tiny.voice)))
    assert two.keys() == one.keys() | {"audio_emb.1"}
    for index in range(4):
        assert torch.allclose(two[f"latents.block{index}"], one[f"latents.block{index}"], atol=2e-5)


def test_voices_are_heard_where_their_people_are(tiny, one, files):
    halves = files["left.png"], files["right.png"]
    orders = {
        "left": tiny.request(audio=both(files["other.wav"], tiny.voice), masks=halves),
        "right": tiny.request(audio=both(tiny.voice, files["other.wav"]), masks=halves),
        "turned": tiny.request(audio=both(tiny.voice, files["other.wav"]), masks=halves[::-1]),
    }
    found = {name: tensors_of(tiny, request)["latents.block0"] for name, request in orders.items()}
    assert torch.equal(found["left"], found["turned"])
    assert not torch.allclose(found["left"], found["right"], atol=1e-3)
    assert not torch.allclose(found["left"], one["latents.block0"], atol=1e-3)


def test_a_mask_is_everywhere_but_where_others_are(files):
    group = read_group([files["second.png"]], [files["left.png"], files["right.png"]], 2)
    masks = token_masks(group, SIDE, SIDE)
    assert masks is not None
    left, right = masks.view(2, SIDE // 16, SIDE // 16)
    # The other's grown by a tenth of eight tokens: one column beyond the middle.
    assert left.sum(0).tolist() == [8, 8, 8, 0, 0, 0, 0, 0]
    assert right.sum(0).tolist() == [0, 0, 0, 0, 0, 8, 8, 8]


@pytest.mark.parametrize("people", [2, 3, 4])
def test_without_masks_people_share_the_picture(files, people):
    masks = token_masks(read_group([files["second.png"]], [], people), SIDE, SIDE)
    assert masks is not None
    assert masks.shape == (people, TOKENS)
    assert torch.equal(masks.sum(0), torch.ones(TOKENS))
    firsts = [int(mask.view(8, 8).sum(0).nonzero()[0]) for mask in masks]
    assert firsts == sorted(firsts)
    assert len(set(firsts)) == people


def test_portraits_stand_side_by_side(tiny, files):
    low = tiny.root / "low.png"
    draw_portrait(64, 96).save(low)  # height, width
    group = read_group([files["second.png"], low], [], 2)
    assert group.portrait.image.size == (64 + 96, 64)
    inputs = read_inputs(tiny.request(image=both(files["second.png"], low), audio=both(tiny.voice, tiny.voice)))
    height, width = inputs.portrait.shape[1:]
    assert inputs.masks is not None
    assert inputs.masks.shape == (2, height // 16 * (width // 16))
    together = inputs.masks.sum(0)
    assert together.min() == 1  # black around the picture is nobody's
    assert (together == 1).sum() > 0.8 * len(together)


WRONG = {
    "three portraits": ({"image": 3, "audio": 2}, "3 portraits for 2 voices"),
    "portraits and no voice each": ({"image": 2, "audio": 1}, "2 portraits for 1 voices"),
    "masks and portraits": ({"image": 2, "audio": 2, "masks": 2}, "give one of both"),
    "a mask and one voice": ({"masks": 1}, "there is one voice"),
    "too few masks": ({"audio": 2, "masks": 1}, "1 times for 2 voices"),
    "too many masks": ({"audio": 2, "masks": 3}, "3 times for 2 voices"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_together_is_said(tiny, files, case):
    counts, said = WRONG[case]
    request = tiny.request(
        image=both(*[files["second.png"]] * counts.get("image", 1)),
        audio=both(*[tiny.voice] * counts.get("audio", 1)),
        masks=tuple([files["left.png"]] * counts.get("masks", 0)),
    )
    with pytest.raises(InputError, match=said):
        read_inputs(request)


def drawn(path: Path, size: tuple[int, int], fill: int) -> Path:
    Image.new("L", size, fill).save(path)
    return path


def test_masks_that_cannot_be_used_are_said(tiny, files, tmp_path):
    bad = {
        "is 64x128 px, and the portrait 128x128": drawn(tmp_path / "narrow.png", (64, 128), 255),
        "has nothing white": drawn(tmp_path / "black.png", (SIDE, SIDE), 100),
        "mask .* is not a file": tmp_path / "gone.png",
    }
    for said, mask in bad.items():
        request = tiny.request(audio=both(tiny.voice, tiny.voice), masks=(files["left.png"], mask))
        with pytest.raises(InputError, match=said):
            read_inputs(request)


def test_the_shortest_voice_ends_the_video_which_is_said(tiny, files, caplog):
    with caplog.at_level(logging.WARNING):
        inputs = read_inputs(tiny.request(audio=both(files["longer.wav"], tiny.voice), num_clip=None))
    assert "the last 1.50 s of what was read are left out" in caplog.text
    assert {len(speech) for speech in inputs.speeches} == {24000}


def test_a_missing_second_voice_is_named(tiny):
    with pytest.raises(InputError, match=r"gone\.wav"):
        read_inputs(tiny.request(audio=both(tiny.voice, tiny.root / "gone.wav")))


def test_both_are_heard_in_the_video(tiny, files, tmp_path):
    pipeline = AvatarPipeline.from_artifact(tiny.artifact("fp32"), device="cpu")
    request = tiny.request(audio=both(tiny.voice, files["other.wav"]), num_clip=None, sample_steps=1)
    report = infer(pipeline, request, Outputs(video=tmp_path / "two.mp4"), quiet=True)
    found = probe(tmp_path / "two.mp4")
    assert found["has_audio"]
    assert found["frames"] == report["frames_written"]
    assert len(report["other_voices"]) == 1


@pytest.mark.parametrize("lengths", [(1.0, 1.0), (1.0, 0.5)])
def test_voices_are_mixed(tmp_path, lengths):
    paths = [tmp_path / f"{index}.wav" for index in range(2)]
    for path, seconds, hz in zip(paths, lengths, (300, 500), strict=True):
        tone = 0.3 * np.sin(np.arange(int(16000 * seconds)) / 16000 * 2 * np.pi * hz)
        write_wav(path, tone.astype(np.float32), 16000)
    track, parts = MixedTrack([Sound(path=path) for path in paths]), []
    while (frame := track.read(1000)) is not None:
        parts.append(frame.to_ndarray()[0])
    track.close()
    heard = np.concatenate(parts)
    assert abs(len(heard) - 48000 * min(lengths)) <= 1000
    seconds = np.arange(4800, 19200) / 48000  # whole periods of both
    for hz, loud in {300: 0.3, 500: 0.3, 400: 0.0}.items():
        part = 2 * abs(np.mean(heard[4800:19200] * np.exp(-2j * np.pi * hz * seconds)))
        assert part == pytest.approx(loud, abs=0.01)


def test_long_voices_are_asked_for_together():
    short = WholeVoice(torch.zeros(1, 2, 3, 10))

    class Long(WholeVoice):
        pass

    assert together([short]) is short
    whole = together([short, WholeVoice(torch.ones(1, 2, 3, 8))])
    assert isinstance(whole, WholeVoice)
    assert whole.features.shape == (2, 2, 3, 8)
    windows = voices_module.VoiceInWindows([8], PiecesOf(torch.ones(1, 2, 3, 8)))
    several = together([short, windows])
    assert isinstance(several, SeveralVoices)
    assert several.num_frames == 8
    assert several.frames(2, 4).shape == (2, 2, 3, 4)


class PiecesOf:
    failure: BaseException | None = None

    def __init__(self, piece: torch.Tensor) -> None:
        self._piece = piece

    def take(self, index: int) -> torch.Tensor:
        return self._piece

    def close(self) -> None:
        """There is nothing to close."""


def pose_file(path: Path, frames: int, fps: int = 25) -> Path:
    """Each picture is brighter than the one before."""
    with contextlib.closing(VideoWriter(path, SIDE, SIDE, fps=fps)) as writer:
        for index in range(frames):
            writer.write(np.full((1, SIDE, SIDE, 3), 40 + 4 * index, np.uint8))
    return path


RATES = {25: [0, 1, 2, 3, 4, 5, 6, 7], 50: [0, 2, 4, 6, 8, 10, 12, 14], 30: [0, 1, 2, 3, 4, 6, 7, 8]}


@pytest.mark.parametrize("fps", RATES)
def test_poses_are_those_of_each_frames_time(tmp_path, fps):
    path = pose_file(tmp_path / "pose.mp4", 24, fps)
    (clip,) = pose_clips(path, 1, 8, SIDE, SIDE)
    seen = ((clip[0, :, 64, 64] + 1) * 127.5 - 40) / 4
    assert [round(float(value)) for value in seen] == RATES[fps]


def test_poses_end_in_black(tmp_path, caplog):
    path = pose_file(tmp_path / "pose.mp4", 10)
    with caplog.at_level(logging.WARNING):
        first, second = pose_clips(path, 2, 8, SIDE, SIDE)
    assert first.min() > -1
    assert torch.equal(second[:, 2:], torch.full_like(second[:, 2:], -1.0))
    assert "ends in clip 2 of 2" in caplog.text


def test_poses_are_followed(tiny, one, tmp_path):
    path = pose_file(tmp_path / "pose.mp4", 32)
    posed = tensors_of(tiny, tiny.request(pose_video=path))
    assert not torch.equal(posed["latents.block0"], one["latents.block0"])
    other = pose_file(tmp_path / "other.mp4", 16)  # the same in the first clip
    again = tensors_of(tiny, tiny.request(pose_video=other))
    assert torch.equal(again["latents.block1"], posed["latents.block1"])
    assert not torch.equal(again["latents.block2"], posed["latents.block2"])


@pytest.mark.parametrize("content", [b"", b"no video at all"])
def test_a_pose_video_that_is_none_is_said_before_anything_loads(tiny, tmp_path, content):
    path = tmp_path / "pose.mp4"
    path.write_bytes(content)
    with pytest.raises(InputError, match="pose video"):
        read_inputs(tiny.request(pose_video=path))
    with pytest.raises(InputError, match="is not a file"):
        read_inputs(tiny.request(pose_video=tmp_path / "gone.mp4"))


def test_a_folder_gets_a_file_called_by_all_of_them(tiny, files, tmp_path):
    request = tiny.request(image=both(tiny.portrait, files["second.png"]), audio=both(tiny.voice, files["other.wav"]))
    path = place_of_video(None, tmp_path, request)
    assert path.name == "portrait+second_voice+other_128x128_2step_seed420.mp4"
