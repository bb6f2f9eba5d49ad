"""Portraits and voices drawn by formula, so that a demonstration needs no file: one of each by default, others on
request, as training and measurements of the tiny model make them."""

from __future__ import annotations

import dataclasses
import os
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from lowvram_models.constants import SPEECH_RATE_HZ

Colour = tuple[int, int, int]

_SUPERSAMPLE = 2  # drawn larger and scaled down: smooth edges
# First three formants in Hz of a, e, i, o, u: round figures of an adult speaker.
_VOWELS_HZ = np.array([[730, 1090, 2440], [530, 1840, 2480], [290, 2250, 3000], [570, 840, 2410], [320, 870, 2240]])
_BANDWIDTHS_HZ = (90.0, 120.0, 180.0)
_FORMANT_GAINS = (1.0, 0.5, 0.25)
_HIGHEST_HARMONIC_HZ = 4000.0
_CLOSED_EYE = 0.12  # of an open eye's height: what is left is the line of the lashes
_INK: Colour = (0x15, 0x15, 0x1A)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Person:
    """Who is drawn and before what: colours, and sizes in hundredths of the picture's shorter side."""

    background_top: Colour = (186, 208, 222)
    background_bottom: Colour = (118, 146, 158)
    clothes: Colour = (0x3F, 0x5F, 0x8A)
    hair: Colour = (0x4A, 0x2F, 0x22)
    skin: Colour = (0xEE, 0xBD, 0x9D)
    neck: Colour = (0xD9, 0xA3, 0x84)
    ears: Colour = (0xE3, 0xAC, 0x8B)
    cheeks: Colour = (0xF0, 0xAB, 0x90)
    nose: Colour = (0xE0, 0xA5, 0x85)
    iris: Colour = (0x42, 0x62, 0x7A)
    lips: Colour = (0xB5, 0x56, 0x4F)
    mouth: Colour = (0x7C, 0x2F, 0x30)
    face_width: float = 20.0
    """From its middle, as all widths and heights here."""
    face_height: float = 27.0
    hair_width: float = 25.0
    hair_height: float = 31.0
    fringe: float = 9.0
    shoulders: float = 44.0
    eye_distance: float = 8.0
    eye_size: float = 1.0
    """1 is the size of the default face's."""
    shift_x: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expression:
    """What moves: ``mouth`` 0 (closed) to 1 (wide open), ``mouth_width`` 1 is at rest, ``eyes_closed`` 0 to 1, ``nod``
    how far the head is down in hundredths of the picture's shorter side."""

    mouth: float = 0.2
    mouth_width: float = 1.0
    eyes_closed: float = 0.0
    nod: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speech:
    """How a voice speaks. ``seed`` draws its vowels, and the loudness of its syllables where ``unevenness`` (0 to 1)
    says that they differ; the last of ``phrase_syllables`` syllables is a pause."""

    seed: int = 7
    syllables_a_second: float = 4.0
    phrase_syllables: int = 7
    pitch_hz: float = 120.0
    glide_hz: float = 18.0
    formant_scale: float = 1.0
    unevenness: float = 0.0


def draw_portrait(
    height: int, width: int, person: Person | None = None, expression: Expression | None = None
) -> Image.Image:
    """A plain drawn face on a soft background, RGB, ``height`` x ``width`` px; the same call draws the same pixels.

    Raises:
        ValueError: a side under 32 px.
    """
    if min(height, width) < 32:
        raise ValueError(f"expected a height and width of at least 32 px, received {height} and {width}")
    person, expression = person or Person(), expression or Expression()
    canvas = _background(height * _SUPERSAMPLE, width * _SUPERSAMPLE, person)
    unit = min(canvas.size) / 100
    pen = _Pen(ImageDraw.Draw(canvas), canvas.width / 2 + person.shift_x * unit, 0.52 * canvas.height, unit)
    _draw_body(pen, person, canvas.height)
    _draw_head(pen, person, expression)
    soft = canvas.filter(ImageFilter.GaussianBlur(min(canvas.size) / 400))
    return soft.resize((width, height), Image.Resampling.LANCZOS)


def _background(height: int, width: int, person: Person) -> Image.Image:
    rows = np.linspace(0.0, 1.0, height)[:, None, None]
    top, bottom = (np.array(colour, dtype=float) for colour in (person.background_top, person.background_bottom))
    pixels_HWC = np.broadcast_to(top + (bottom - top) * rows, (height, width, 3))
    return Image.fromarray(pixels_HWC.round().astype(np.uint8))


@dataclasses.dataclass(frozen=True)
class _Pen:
    """``unit`` is one hundredth of the picture's shorter side; (``x``, ``y``) is where the face's middle is at rest."""

    draw: ImageDraw.ImageDraw
    x: float
    y: float
    unit: float

    def oval(self, x: float, y: float, radius_x: float, radius_y: float, colour: Colour) -> None:
        box = (x - radius_x, y - radius_y, x + radius_x, y + radius_y)
        corners = [v * self.unit + c for v, c in zip(box, (self.x, self.y) * 2, strict=True)]
        self.draw.ellipse((corners[0], corners[1], corners[2], corners[3]), fill=colour)


def _draw_body(pen: _Pen, person: Person, bottom: float) -> None:
    unit, wide = pen.unit, person.shoulders
    pen.oval(0, 60, wide, 32, person.clothes)
    box = (pen.x - wide * unit, pen.y + 60 * unit, pen.x + wide * unit, bottom + 62 * unit)
    pen.draw.rectangle(box, fill=person.clothes)


def _draw_head(pen: _Pen, person: Person, expression: Expression) -> None:
    y = expression.nod
    wide, high = person.face_width, person.face_height
    pen.oval(0, y - 6, person.hair_width, person.hair_height, person.hair)
    pen.oval(0, 26, 9, 14, person.neck)
    pen.oval(0, y + 4, wide, high, person.skin)
    pen.oval(0, y - 19, wide - 1, person.fringe, person.hair)
    for side in (-1, 1):
        pen.oval(side * wide, y + 5, 3, 5, person.ears)
        _draw_eye(pen, person, side * person.eye_distance, y, 1.0 - expression.eyes_closed)
        pen.oval(side * (person.eye_distance + 3), y + 11, 4.0, 3.0, person.cheeks)
    pen.oval(0, y + 8, 2.6, 3.4, person.nose)
    _draw_mouth(pen, person, expression, y)


def _draw_eye(pen: _Pen, person: Person, x: float, y: float, openness: float) -> None:
    size, high = person.eye_size, person.eye_size * max(openness, _CLOSED_EYE)
    pen.oval(x, y - 7, 4.6, 1.0, person.hair)
    if openness <= _CLOSED_EYE:
        pen.oval(x, y, 4.0 * size, 2.6 * high, person.hair)
        return
    pen.oval(x, y, 4.0 * size, 2.6 * high, (0xFD, 0xFD, 0xFD))
    pen.oval(x, y, 2.1 * size, 2.4 * high, person.iris)
    pen.oval(x, y, 1.0 * size, 1.2 * high, _INK)
    pen.oval(x + 0.8, y - 0.9 * high, 0.5 * size, 0.5 * high, (0xFF, 0xFF, 0xFF))


def _draw_mouth(pen: _Pen, person: Person, expression: Expression, y: float) -> None:
    """The lower lip goes down twice as far as the upper one goes up; teeth show from a small opening on."""
    wide, gap = expression.mouth_width, 5.0 * (expression.mouth - 0.2)
    middle = y + 19 + 0.3 * gap
    pen.oval(0, middle, 7.0 * wide, 3.2 + gap, person.lips)
    pen.oval(0, middle, 5.4 * wide, 1.3 + gap, person.mouth)
    teeth = min(0.7 + 0.7 * gap, 1.1)
    if teeth > 0.1:
        pen.oval(0, middle - 0.6 - 0.7 * gap, 4.6 * wide, teeth, (0xF7, 0xF2, 0xEA))


def synth_voice(seconds: float, rate: int = SPEECH_RATE_HZ, speech: Speech | None = None) -> NDArray[np.float32]:
    """Speech-like syllables: harmonics of a gliding pitch, shaped by vowel formants; deterministic.

    Returns:
        float32 [round(seconds * rate)], mono, peak 0.6.

    Raises:
        ValueError: no samples, or a rate under 8000 Hz.
    """
    count = round(seconds * rate)
    if count < 1 or rate < 8000:
        raise ValueError(f"expected a positive length and at least 8000 Hz, received {seconds} s at {rate} Hz")
    speech = speech or Speech()
    time_s = np.arange(count) / rate
    syllable = time_s * speech.syllables_a_second
    glide = np.sin(2 * np.pi * 0.43 * time_s)
    pitch_hz = speech.pitch_hz + speech.glide_hz * glide + 6.0 * np.sin(2 * np.pi * 1.7 * time_s)
    voiced = _harmonics(pitch_hz, _formant_tracks(syllable, speech), rate) * _loudness(syllable, speech)
    samples: NDArray[np.float32] = (0.6 * voiced / np.abs(voiced).max()).astype(np.float32)
    return samples


def _formant_tracks(syllable: NDArray[np.float64], speech: Speech) -> list[NDArray[np.float64]]:
    """Each formant in Hz over time, gliding from one syllable's vowel to the next."""
    order = np.random.default_rng(speech.seed).integers(0, len(_VOWELS_HZ), int(syllable[-1]) + 2)
    centres = np.arange(len(order)) + 0.5
    vowels_hz = _VOWELS_HZ[order] * speech.formant_scale
    return [np.interp(syllable, centres, vowels_hz[:, formant]) for formant in range(3)]


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


def _loudness(syllable: NDArray[np.float64], speech: Speech) -> NDArray[np.float64]:
    """A bump a syllable and a short pause after each phrase; never quite silent."""
    bump = np.sin(np.pi * (syllable % 1.0)) ** 0.7
    number = np.floor(syllable)
    if speech.unevenness:
        draw = np.random.default_rng([speech.seed, 1]).uniform(1.0 - speech.unevenness, 1.0, int(syllable[-1]) + 1)
        bump = bump * draw[number.astype(int)]
    pause = number % speech.phrase_syllables == speech.phrase_syllables - 1
    return 0.03 + np.where(pause, 0.0, bump)


def write_wav(path: str | os.PathLike[str], samples: NDArray[np.float32], rate: int) -> None:
    """Write mono samples, float32 in [-1, 1] (clipped to it), as a 16-bit WAV."""
    pcm = np.clip(np.rint(np.asarray(samples) * 32768.0), -32768, 32767).astype("<i2")
    with wave.open(str(Path(path)), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pcm.tobytes())
