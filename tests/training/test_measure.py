"""Measures of the tiny face, on videos whose figures are known because the rule drew them."""

from __future__ import annotations

import argparse
import math

import numpy as np
import pytest

from training.tiny_face import faces, measure, rollouts
from training.tiny_face.case import Case


class Drawn:
    """A pipeline whose videos are what the rule draws, in blocks of 12 frames and 9 for the first; ``worse`` adds
    noise to each, by its number and the seed; more frames come than are needed, as of a pipeline."""

    def __init__(self, case: Case, worse=lambda frame, seed: 0.0):
        self.case, self.worse = case, worse

    def stream(self, request):
        assert request.image == self.case.image
        seed, total = request.base_seed, -(-(self.case.frames + 3) // 12) * 12 - 3
        for first in (0, *range(9, total, 12)):
            shown = range(first, first + (12 if first else 9))
            frames = self.case.drawn(shown).astype(float)
            for index, frame in enumerate(shown):
                draw = np.random.default_rng([frame, seed])
                frames[index] += self.worse(frame, seed) * draw.standard_normal(frames[index].shape)
            yield np.clip(frames.round(), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Drawn once: that takes longer than everything else here."""
    made = Case(tmp_path_factory.mktemp("case"), faces.HELD_OUT + 1, 4.5)
    every = made.drawn(range(made.frames + 12))
    made.drawn = lambda frames: every[frames.start : frames.stop : frames.step]
    return made


def test_a_drawn_video_is_without_fault(case):
    found = rollouts.over_time(case, Drawn(case), 1.0)
    assert [window["from_s"] for window in found["windows"]] == [0.0, 1.0, 2.0, 3.0, 4.0]
    for window in found["windows"]:
        assert window["drawn_psnr"] == math.inf
        assert window["mouth_with_voice"] > 0.7
        assert window["background_psnr"] > 40


def test_drift_is_told(case):
    growing = rollouts.over_time(case, Drawn(case, lambda frame, seed: 1 + frame / 25), 1.0)["drift"]["background_psnr"]
    assert growing["first"] > growing["last"] == growing["lowest"]
    assert growing["a_minute"] < -60
    even = rollouts.over_time(case, Drawn(case, lambda frame, seed: 3), 1.0)["drift"]["background_psnr"]
    assert abs(even["a_minute"]) < 5


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([30.0, 30.0, 30.0], {"first": 30, "last": 30, "lowest": 30, "a_minute": 0}),
        ([30.0, 29.0, 28.0], {"first": 30, "last": 28, "lowest": 28, "a_minute": -1}),
        ([28.0, 29.0, 30.0], {"first": 28, "last": 30, "lowest": 28, "a_minute": 1}),
        ([30.0, 20.0, 30.0], {"first": 30, "last": 30, "lowest": 20, "a_minute": 0}),
        ([31.0], {"first": 31, "last": 31, "lowest": 31, "a_minute": 0}),
    ],
)
def test_drift_is_a_straight_line(values, expected):
    windows = [{"from_s": 60.0 * index, "figure": value} for index, value in enumerate(values)]
    assert rollouts.drift(windows) == {"figure": pytest.approx(expected, abs=1e-9)}


def test_seeds_differ_by_their_noise(case):
    found = rollouts.seeds(case, Drawn(case, lambda frame, seed: 4))
    assert set(found["each"]) == {str(seed) for seed in rollouts.SEEDS}
    assert all(30 < value < 36 for value in found["psnr_between"].values())
    assert len(found["psnr_between"]) == 3


def test_where_the_sink_is_refreshed_a_jump_is_seen(case):
    first_clip = rollouts.CLIP_FRAMES - 3
    jumping = Drawn(case, lambda frame, seed: 0 if frame < first_clip else 9)
    found = rollouts.refresh(case, jumping, Drawn(case))
    assert [clip["drawn_psnr"] < 40 for clip in found["refreshed"]["clips"]] == [False, True, True]
    assert found["refreshed"]["step_at_refresh"] > found["portrait_kept"]["step_at_refresh"] + 3
    assert found["portrait_kept"]["clips"][1]["drawn_psnr"] == math.inf


@pytest.mark.parametrize("clip", rollouts.CLIPS)
def test_last_blocks_of_clips_are_found(case, clip):
    length = clip % 12 or 12

    def worse(frame: int, seed: int) -> float:
        return 9.0 if (frame + 3) % clip >= clip - length else 0.0

    video = np.concatenate(list(Drawn(case, worse).stream(case.request())))[: case.frames]
    assert rollouts.in_last_blocks(case, video, clip) < 31
    elsewhere = np.concatenate(list(Drawn(case, lambda frame, seed: 9 - worse(frame, seed)).stream(case.request())))
    assert rollouts.in_last_blocks(case, elsewhere[: case.frames], clip) == math.inf


def lora(mouth: float, other: float, background: float) -> dict:
    mean = {"mouth_with_voice": mouth, "mouth_with_other_voice": other, "background_psnr": background}
    return {"lora": {"with_lora": {"mean": mean, "each": {"1": mean}}}}


@pytest.mark.parametrize(
    ("found", "missed"),
    [
        (lora(0.9, 0.1, 38), []),
        (lora(0.5, 0.1, 38), ["mouth_with_voice of 1 is 0.5, expected 0.6 or more"]),
        (lora(0.9, 0.3, 38), ["mouth_with_other_voice on average is 0.3, expected 0.2 or less"]),
        (lora(0.9, 0.1, 24), ["background_psnr of 1 is 24, expected 25 or more"]),
        ({"minutes": {"7": {"windows": [{"mouth_with_voice": 0.9, "background_psnr": 20.0}]}}},
         ["background_psnr of 7 is 20, expected 25 or more"]),
        ({"long": {"windows": [{"mouth_with_voice": 0.2, "background_psnr": 30.0}]}},
         ["mouth_with_voice of long is 0.2, expected 0.6 or more"]),
        ({"seeds": {}}, []),
    ],
)  # fmt: skip
def test_what_is_promised_is_held(found, missed):
    assert measure.missed(found) == missed


@pytest.mark.parametrize("text", ["", "all", "lora,", "seed", "LORA"])
def test_a_part_that_is_not_known(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected some of lora,"):
        measure.parts(text)
