"""Videos of one voice side by side on one picture: frames, their difference, and the mouth beside the voice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lowvram.media.talking import Curve, at_frames, correlation, envelope, mouth_opening

Frames = NDArray[np.uint8]

COLUMNS = 8
AMPLIFIED = 8
_MARGIN, _PLOT = 6, 96
_INK, _VOICE = (30, 30, 34), (196, 200, 208)
_LINES = ((176, 48, 48), (36, 92, 176), (60, 130, 60))


def contact_sheet(
    portrait: Image.Image, videos: Mapping[str, Frames], voice: NDArray[np.float32], fps: float
) -> Image.Image:
    """Of two videos or more [F, H, W, 3] of equal length and size, by name: ``COLUMNS`` frames of each, the difference
    of the first two ``AMPLIFIED``, and over the whole length the voice's loudness (16 kHz, mono) with the openings of
    the mouths, each stretched to its own highest.

    Raises:
        ValueError: fewer than two videos, or of different shapes.
    """
    shapes = {frames.shape for frames in videos.values()}
    if len(videos) < 2 or len(shapes) != 1:
        raise ValueError(f"{len(videos)} videos of shapes {sorted(shapes)}; expected two or more of one shape")
    ((count, height, width, _),) = shapes
    shown = [round((column + 0.5) * count / COLUMNS) for column in range(COLUMNS)]
    rows = {name: [frames[at] for at in shown] for name, frames in videos.items()}
    one, other = list(videos)[:2]
    rows[f"{one} - {other}, {AMPLIFIED}x"] = [amplified(videos[one][at], videos[other][at]) for at in shown]
    step_x, step_y = width + _MARGIN, height + _MARGIN
    sheet = Image.new(
        "RGB", (_MARGIN + (COLUMNS + 1) * step_x, _MARGIN + len(rows) * step_y + _PLOT + _MARGIN), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for index, (name, frames) in enumerate(rows.items()):
        top = _MARGIN + index * step_y
        for column, frame in enumerate(frames):
            sheet.paste(Image.fromarray(frame), (_MARGIN + (column + 1) * step_x, top))
        _label(draw, (_MARGIN + step_x, top), name)
    sheet.paste(portrait.convert("RGB").resize((width, height)), (_MARGIN, _MARGIN))
    _label(draw, (_MARGIN, _MARGIN), "portrait")
    box = (_MARGIN + step_x, _MARGIN + len(rows) * step_y, sheet.width - _MARGIN, sheet.height - _MARGIN)
    loud = at_frames(envelope(voice), count, fps)
    _plot(draw, box, loud, {name: mouth_opening(frames) for name, frames in videos.items()})
    return sheet


def follows(frames: Frames, voice: NDArray[np.float32], fps: float) -> float:
    """Correlation of the mouth's opening in the frames [F, H, W, 3] of a drawn face with the loudness of the voice."""
    return correlation(mouth_opening(frames), at_frames(envelope(voice), len(frames), fps))


def _label(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str) -> None:
    font = ImageFont.load_default(12)
    left, top, right, bottom = draw.textbbox((at[0] + 3, at[1] + 2), text, font)
    draw.rectangle((left - 3, top - 2, right + 3, bottom + 2), fill="white")
    draw.text((at[0] + 3, at[1] + 2), text, _INK, font)


def amplified(a: Frames, b: Frames) -> Frames:
    """The difference a - b of pixels, ``AMPLIFIED`` times, around grey."""
    far = (a.astype(np.int16) - b.astype(np.int16)) * AMPLIFIED + 128
    return np.clip(far, 0, 255).astype(np.uint8)


def _plot(draw: ImageDraw.ImageDraw, box: Sequence[int], loud: Curve, openings: Mapping[str, Curve]) -> None:
    left, top, right, bottom = box
    x = np.linspace(left, right, len(loud))

    def points(curve: Curve) -> list[tuple[float, float]]:
        height = (curve - curve.min()) / max(float(np.ptp(curve)), 1e-9)
        return list(zip(x.tolist(), (bottom - height * (bottom - top - 2)).tolist(), strict=True))

    draw.polygon([(left, bottom), *points(loud), (right, bottom)], fill=_VOICE)
    labels = [("voice", (140, 146, 158))]
    for (name, curve), colour in zip(openings.items(), _LINES, strict=False):
        draw.line(points(curve), fill=colour, width=2)
        labels.append((f"mouth, {name}", colour))
    for index, (label, colour) in enumerate(labels):
        draw.text((_MARGIN + 2, top + 4 + 18 * index), label, colour, ImageFont.load_default(12))
