"""People and voices by number: the same number draws the same face and speaks the same way.

Numbers from ``HELD_OUT`` on are for measurements; training stays below. The default portrait and voice of
``lowvram.media.samples`` have no number: training never sees them either.
"""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray

from lowvram.media.samples import Colour, Expression, Person, Speech, draw_portrait

HELD_OUT = 1_000_000
SIZE = 128


def person(number: int) -> Person:
    """Skin, hair, clothes, eyes and background of any colour that such things have, sizes up to a sixth off."""
    draw = np.random.default_rng([number, 11])
    skin = _mixed((238, 192, 160), (150, 98, 66), draw.uniform() ** 1.3)
    skin = _shifted(skin, draw.uniform(-10, 10, 3))
    hair = _hsv(draw.uniform(0.02, 0.13), draw.uniform(0.2, 0.75), draw.uniform(0.08, 0.75))
    lips = _shifted(_mixed(skin, (170, 50, 60), draw.uniform(0.45, 0.8)), draw.uniform(-8, 8, 3))
    top, bottom = (_hsv(draw.uniform(), draw.uniform(0.05, 0.5), draw.uniform(0.45, 0.95)) for _ in range(2))
    if draw.uniform() < 0.5:
        bottom = _mixed(top, (60, 70, 75), draw.uniform(0.1, 0.6))

    def size(usual: float, share: float) -> float:
        return float(usual * draw.uniform(1 - share, 1 + share))

    face_width = size(20, 0.1)
    return Person(
        background_top=top,
        background_bottom=bottom,
        clothes=_hsv(draw.uniform(), draw.uniform(0.1, 0.75), draw.uniform(0.15, 0.9)),
        hair=hair,
        skin=skin,
        neck=_mixed(skin, (120, 70, 50), 0.18),
        ears=_mixed(skin, (140, 80, 60), 0.12),
        cheeks=_mixed(skin, (245, 130, 120), 0.25),
        nose=_mixed(skin, (150, 90, 60), 0.15),
        iris=_hsv(draw.uniform(0.05, 0.65), draw.uniform(0.3, 0.6), draw.uniform(0.25, 0.6)),
        lips=lips,
        mouth=_mixed(lips, (30, 5, 10), draw.uniform(0.45, 0.75)),
        face_width=face_width,
        face_height=size(27, 0.05),
        hair_width=face_width + draw.uniform(2, 7.5),
        hair_height=size(31, 0.06),
        fringe=size(9, 0.3),
        shoulders=size(44, 0.15),
        eye_distance=size(8, 0.1),
        eye_size=size(1, 0.15),
        shift_x=draw.uniform(-3, 3),
    )


def speech(number: int) -> Speech:
    """Slow and fast, high and low, even and uneven ones."""
    draw = np.random.default_rng([number, 12])
    return Speech(
        seed=int(draw.integers(1000, 2**31)),
        syllables_a_second=float(draw.uniform(2.2, 5.0)),
        phrase_syllables=int(draw.integers(4, 11)),
        pitch_hz=float(draw.uniform(90, 230)),
        glide_hz=float(draw.uniform(5, 30)),
        formant_scale=float(draw.uniform(0.92, 1.2)),
        unevenness=float(draw.uniform(0, 0.7)),
    )


def at_rest(number: int) -> Expression:
    """How a person looks in the portrait: the mouth closed or a little open."""
    return Expression(mouth=float(np.random.default_rng([number, 13]).uniform(0.0, 0.35)))


def picture(who: Person, expression: Expression, size: int = SIZE) -> NDArray[np.uint8]:
    """uint8 [size, size, 3]."""
    return np.asarray(draw_portrait(size, size, who, expression))


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    return _colour(255 * part for part in colorsys.hsv_to_rgb(hue, saturation, value))


def _mixed(one: Colour, other: Colour, share: float) -> Colour:
    return _colour(a + (b - a) * share for a, b in zip(one, other, strict=True))


def _shifted(colour: Colour, by: NDArray[np.float64]) -> Colour:
    return _colour(c + d for c, d in zip(colour, by, strict=True))


def _colour(parts) -> Colour:
    red, green, blue = (int(min(max(round(part), 0), 255)) for part in parts)
    return red, green, blue
