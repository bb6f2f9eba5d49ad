"""Videos side by side on one picture, and how a mouth follows a voice."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lowvram.media.contact_sheet import AMPLIFIED, COLUMNS, contact_sheet, follows
from lowvram.media.samples import Expression, draw_portrait, synth_voice
from lowvram.media.talking import at_frames, envelope

FPS, SIDE = 25, 64
VOICE = synth_voice(2.0)


def speaking(voice: np.ndarray) -> np.ndarray:
    """Drawn frames whose mouth opens with the voice."""
    loud = at_frames(envelope(voice), 50, FPS)
    openings = loud / loud.max()
    frames = [draw_portrait(SIDE, SIDE, expression=Expression(mouth=float(opening))) for opening in openings]
    return np.stack([np.asarray(frame) for frame in frames])


FRAMES = speaking(VOICE)


def test_frames_difference_and_curves_have_their_places():
    other = np.clip(FRAMES.astype(int) + 2, 0, 255).astype(np.uint8)
    sheet = contact_sheet(draw_portrait(SIDE, SIDE), {"one": other, "other": FRAMES}, VOICE, FPS)
    assert sheet.width > (COLUMNS + 1) * SIDE
    pixels = np.asarray(sheet).astype(int)
    step = SIDE + 6
    shown = [round((column + 0.5) * 50 / COLUMNS) for column in range(COLUMNS)]
    for column, at in enumerate(shown):
        left = 6 + (column + 1) * step
        half = slice(6 + SIDE // 2, 6 + SIDE)
        assert np.array_equal(pixels[half, left : left + SIDE], other[at][SIDE // 2 :])
        difference = pixels[6 + 2 * step + SIDE // 2 : 6 + 2 * step + SIDE, left : left + SIDE]
        assert abs(np.median(difference) - (128 + 2 * AMPLIFIED)) <= 1
    plot = pixels[6 + 3 * step :, 6 + step :].reshape(-1, 3)
    assert len(np.unique(plot, axis=0)) > 3


def test_the_mouth_follows_its_own_voice_and_no_other():
    assert follows(FRAMES, VOICE, FPS) > 0.9
    assert abs(follows(np.repeat(FRAMES[:1], 50, axis=0), VOICE, FPS)) < 1e-6


@pytest.mark.parametrize("videos", [{"one": FRAMES}, {}, {"one": FRAMES, "other": FRAMES[:-1]}])
def test_what_cannot_be_compared_is_refused(videos):
    with pytest.raises(ValueError, match="expected two or more of one shape"):
        contact_sheet(Image.new("RGB", (SIDE, SIDE)), videos, VOICE, FPS)
