"""How loud a voice is and how far a mouth is open: two curves that belong together in a video of a speaking face."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowvram_models.constants import SPEECH_RATE_HZ

STEP_HZ = 100

Curve = NDArray[np.float64]
# Where drawn faces have their mouth and, of plain skin, their cheeks and chin; shares of a square picture's sides.
_MOUTH_ROWS, _MOUTH_COLUMNS = (0.63, 0.86), (0.40, 0.60)
_SKIN_ROWS, _SKIN_COLUMNS = (0.57, 0.64), (0.38, 0.62)
LUMA = np.array([0.299, 0.587, 0.114])
"""What red, green and blue count of a pixel's brightness (Rec. 601)."""


def envelope(samples: NDArray[np.float32]) -> Curve:
    """Loudness of mono samples at 16 kHz, ``STEP_HZ`` values a second, smoothed over 60 ms; 1 is the root mean square
    of the whole voice."""
    wave = samples.astype(np.float64)
    wave = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
    hop = SPEECH_RATE_HZ // STEP_HZ
    whole = np.pad(wave, (0, -len(wave) % hop))
    power = np.square(whole).reshape(-1, hop).mean(axis=1)
    window = np.hanning(9)[1:-1]
    loud: Curve = np.sqrt(np.convolve(power, window / window.sum(), mode="same"))
    return loud


def at_frames(curve: Curve, frames: int, fps: float) -> Curve:
    """A curve at ``STEP_HZ`` where each of ``frames`` video frames is shown; its last value behind its end."""
    at = np.minimum(np.round(np.arange(frames) * STEP_HZ / fps).astype(int), len(curve) - 1)
    return curve[at]


def mouth_opening(frames_FHWC: NDArray[np.uint8]) -> Curve:
    """How far the mouth of a drawn face in the middle of each frame [F, H, W, 3] is open: the share of a box around it
    that is darker than skin, or that much lighter (teeth), weighed by how much. 0 is no mouth at all."""
    luma = frames_FHWC.astype(np.float64) @ LUMA
    skin = np.median(_box(luma, _SKIN_ROWS, _SKIN_COLUMNS), axis=(1, 2))
    mouth = _box(luma, _MOUTH_ROWS, _MOUTH_COLUMNS) / np.maximum(skin, 1.0)[:, None, None]
    opening: Curve = np.clip(np.abs(mouth - 1.0) - 0.1, 0.0, 0.6).mean(axis=(1, 2)) / 0.6
    return opening


def correlation(one: Curve, other: Curve) -> float:
    """Pearson's, 0 where a curve does not change."""
    a, b = one - one.mean(), other - other.mean()
    size = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float((a * b).sum()) / size if size > 1e-9 else 0.0


def _box(luma_FHW: Curve, rows: tuple[float, float], columns: tuple[float, float]) -> Curve:
    height, width = luma_FHW.shape[1:]
    top, bottom = (round(share * height) for share in rows)
    left, right = (round(share * width) for share in columns)
    return luma_FHW[:, top:bottom, left:right]
