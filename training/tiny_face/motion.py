"""What a face does while a voice speaks: a rule, the same for everybody, of the last half second of the voice.

A rule leaves the model no choice, which four Euler steps could not make. Everything counts from loudness relative to
the whole voice, as wav2vec2 hears it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowvram.media.samples import Expression
from lowvram.media.talking import STEP_HZ, envelope

FPS = 25
DELAY_S = 3 / FPS
"""A video's first three frames are dropped: what is shown at a time is what the model hears so much later."""
NAMES = ("mouth", "mouth_width", "eyes_closed", "nod")
NOD = 2.0

Curve = NDArray[np.float64]


def controls(samples: NDArray[np.float32]) -> NDArray[np.float64]:
    """[4, steps] at ``STEP_HZ``, in the order of ``NAMES``; each from 0 to 1 or, the nod, from -1 to 1."""
    loud = envelope(samples)
    mouth = np.clip(loud / 1.6, 0, 1)
    slow = _lagged(loud, 0.0, 0.5)
    nod = np.tanh(2.0 * (_lagged(loud, 0.0, 0.25) - slow))
    before, now = _lagged(loud, 0.22, 0.55), _lagged(loud, 0.0, 0.14)
    eyes = np.clip(1.6 * before - 6.0 * now - 0.25, 0, 1)  # at the beginning of a pause
    width = 1.0 - 0.25 * np.clip(_lagged(loud, 0.0, 0.3) - 0.5, 0, 1)
    return np.stack([mouth, width, eyes, nod])


def expressions(curves: NDArray[np.float64], first: int, frames: int) -> list[Expression]:
    """Of video frames ``first`` on, 25 a second; before the voice and behind it the face is at rest."""
    found = []
    for frame in range(first, first + frames):
        at = frame * STEP_HZ // FPS
        if not 0 <= at < curves.shape[1]:
            found.append(Expression(mouth=0.0))
            continue
        mouth, width, eyes, nod = (float(value) for value in curves[:, at])
        found.append(Expression(mouth=mouth, mouth_width=width, eyes_closed=eyes, nod=NOD * nod))
    return found


def _lagged(curve: Curve, latest_s: float, earliest_s: float) -> Curve:
    """The mean from ``earliest_s`` to ``latest_s`` seconds ago."""
    first, last = round(latest_s * STEP_HZ), round(earliest_s * STEP_HZ)
    window = np.zeros(last + 1)
    window[first : last + 1] = 1.0
    return np.convolve(curve, window / window.sum())[: len(curve)]
