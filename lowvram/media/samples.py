"""A portrait and a voice drawn by formula, so that a demonstration needs no file."""

import os
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

_SUPERSAMPLE = 2  # drawn larger and scaled down: smooth edges
# First three formants in Hz of a, e, i, o, u: round figures of an adult speaker.
_VOWELS_HZ = np.array([[730, 1090, 2440], [530, 1840, 2480], [290, 2250, 3000], [570, 840, 2410], [320, 870, 2240]])
_BANDWIDTHS_HZ = (90.0, 120.0, 180.0)
_FORMANT_GAINS = (1.0, 0.5, 0.25)
_SYLLABLES_A_SECOND = 4.0
_PHRASE_SYLLABLES = 7  # the last one of each phrase is a pause
_HIGHEST_HARMONIC_HZ = 4000.0


def draw_portrait(height: int, width: int) -> Image.Image:
    """A plain drawn face on a soft background, RGB, ``height`` x ``width`` px; the same call draws the same pixels.

    Raises:
        ValueError: a side under 32 px.
    """
    if min(height, width) < 32:
        raise ValueError(f"expected a height and width of at least 32 px, received {height} and {width}")
    canvas = _background(height * _SUPERSAMPLE, width * _SUPERSAMPLE)
    _draw_person(ImageDraw.Draw(canvas), canvas.width / 2, canvas.height, min(canvas.size) / 100)
    soft = canvas.filter(ImageFilter.GaussianBlur(min(canvas.size) / 400))
    return soft.resize((width, height), Image.Resampling.LANCZOS)


def _background(height: int, width: int) -> Image.Image:
    rows = np.linspace(0.0, 1.0, height)[:, None, None]
    top, bottom = np.array([186.0, 208.0, 222.0]), np.array([118.0, 146.0, 158.0])
    pixels_HWC = np.broadcast_to(top + (bottom - top) * rows, (height, width, 3))
    return Image.fromarray(pixels_HWC.round().astype(np.uint8))


def _draw_person(draw: ImageDraw.ImageDraw, centre_x: float, bottom: float, unit: float) -> None:
    """``unit`` is one hundredth of the picture's shorter side; the face is 40 units wide."""
    face_y = 0.52 * bottom

    def oval(x: float, y: float, radius_x: float, radius_y: float, colour: str) -> None:
        box = (x - radius_x, y - radius_y, x + radius_x, y + radius_y)
        draw.ellipse(tuple(v * unit + c for v, c in zip(box, (centre_x, face_y) * 2, strict=True)), fill=colour)

    oval(0, 60, 44, 32, "#3f5f8a")  # shoulders
    draw.rectangle((centre_x - 44 * unit, face_y + 60 * unit, centre_x + 44 * unit, bottom + 62 * unit), fill="#3f5f8a")
    oval(0, -6, 25, 31, "#4a2f22")  # hair
    oval(0, 26, 9, 14, "#d9a384")  # neck
    oval(0, 4, 20, 27, "#eebd9d")  # face
    oval(0, -19, 19, 9, "#4a2f22")  # fringe
    for side in (-1, 1):
        oval(side * 20, 5, 3, 5, "#e3ac8b")  # ear
        oval(side * 8, -7, 4.6, 1.0, "#4a2f22")  # brow
        oval(side * 8, 0, 4.0, 2.6, "#fdfdfd")
        oval(side * 8, 0, 2.1, 2.4, "#42627a")
        oval(side * 8, 0, 1.0, 1.2, "#15151a")
        oval(side * 8 + 0.8, -0.9, 0.5, 0.5, "#ffffff")
        oval(side * 11, 11, 4.0, 3.0, "#f0ab90")  # cheek
    oval(0, 8, 2.6, 3.4, "#e0a585")  # nose
    oval(0, 19, 7.0, 3.2, "#b5564f")  # lips
    oval(0, 19, 5.4, 1.3, "#7c2f30")
    oval(0, 18.4, 4.6, 0.7, "#f7f2ea")  # teeth


def synth_voice(seconds: float, rate: int = 16000) -> NDArray[np.float32]:
    """Speech-like syllables: harmonics of a gliding pitch, shaped by vowel formants; deterministic.

    Returns:
        float32 [round(seconds * rate)], mono, peak 0.6.

    Raises:
        ValueError: no samples, or a rate under 8000 Hz.
    """
    count = round(seconds * rate)
    if count < 1 or rate < 8000:
        raise ValueError(f"expected a positive length and at least 8000 Hz, received {seconds} s at {rate} Hz")
    time_s = np.arange(count) / rate
    syllable = time_s * _SYLLABLES_A_SECOND
    pitch_hz = 120.0 + 18.0 * np.sin(2 * np.pi * 0.43 * time_s) + 6.0 * np.sin(2 * np.pi * 1.7 * time_s)
    voiced = _harmonics(pitch_hz, _formant_tracks(syllable), rate) * _loudness(syllable)
    samples: NDArray[np.float32] = (0.6 * voiced / np.abs(voiced).max()).astype(np.float32)
    return samples


def _formant_tracks(syllable: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Each formant in Hz over time, gliding from one syllable's vowel to the next."""
    order = np.random.default_rng(7).integers(0, len(_VOWELS_HZ), int(syllable[-1]) + 2)
    centres = np.arange(len(order)) + 0.5
    return [np.interp(syllable, centres, _VOWELS_HZ[order, formant].astype(np.float64)) for formant in range(3)]


def _harmonics(pitch_hz: NDArray[np.float64], formants_hz: list[NDArray[np.float64]], rate: int) -> NDArray[np.float64]:
    phase = 2 * np.pi * np.cumsum(pitch_hz) / rate
    top_hz = min(_HIGHEST_HARMONIC_HZ, 0.45 * rate)
    voiced = np.zeros_like(phase)
    for harmonic in range(1, int(top_hz / pitch_hz.max()) + 1):
        frequency_hz = harmonic * pitch_hz
        gain = np.full_like(phase, 0.02)
        for formant_hz, bandwidth_hz, peak in zip(formants_hz, _BANDWIDTHS_HZ, _FORMANT_GAINS, strict=True):
            gain += peak / (1.0 + ((frequency_hz - formant_hz) / bandwidth_hz) ** 2)
        voiced += gain * np.sin(harmonic * phase)
    return voiced


def _loudness(syllable: NDArray[np.float64]) -> NDArray[np.float64]:
    """A bump a syllable and a short pause after each phrase; never quite silent."""
    bump = np.sin(np.pi * (syllable % 1.0)) ** 0.7
    pause = np.floor(syllable) % _PHRASE_SYLLABLES == _PHRASE_SYLLABLES - 1
    return 0.03 + np.where(pause, 0.0, bump)


def write_wav(path: str | os.PathLike[str], samples: NDArray[np.float32], rate: int) -> None:
    """Write mono samples, float32 in [-1, 1] (clipped to it), as a 16-bit WAV."""
    pcm = np.clip(np.rint(np.asarray(samples) * 32768.0), -32768, 32767).astype("<i2")
    with wave.open(str(Path(path)), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pcm.tobytes())
