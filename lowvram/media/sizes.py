"""Sizes: height and width of the video, from a requested size and a portrait's shape."""

import math
import re

from lowvram_kernels.errors import InputError
from lowvram_kernels.rounding import round_up

MULTIPLE_PX = 64  # VAE factor 8, patch 2, and FramePack's coarsest patch 8 in latents
SCALE_STEPS = 100
MIN_AREA_PX = 128 * 128
MAX_AREA_PX = 1920 * 1088
EXAMPLES = "704*384, 832*480 or 1280*720"


def parse_size(size: str) -> tuple[int, int]:
    """Read ``"704*384"`` or ``"704x384"`` as two positive integers.

    The two numbers name an area in pixels; which of them is the height does not matter.

    Raises:
        InputError: malformed, or an area outside ``MIN_AREA_PX`` to ``MAX_AREA_PX``.
    """
    match = re.fullmatch(r"\s*(\d{1,5})\s*[*xX]\s*(\d{1,5})\s*", size, flags=re.ASCII)
    if match is None:
        raise InputError(f"unknown size {size!r}: expected two numbers as A*B or AxB; try {EXAMPLES}")
    first, second = int(match[1]), int(match[2])
    if not MIN_AREA_PX <= first * second <= MAX_AREA_PX:
        raise InputError(
            f"unknown size {size!r}: its area is {first * second} px, expected {MIN_AREA_PX} to {MAX_AREA_PX}; "
            f"try {EXAMPLES}"
        )
    return first, second


def output_size(size: str, image_height: int, image_width: int, *, upscale: bool = False) -> tuple[int, int]:
    """Height and width in px, multiples of 64, of the video made from a portrait.

    The portrait's aspect is kept as far as multiples of 64 allow; the area stays within the requested one. Scales are
    tried in 100 equal steps downwards and the first that fits wins, as in the reference's table of sizes. A portrait
    that is smaller than the area makes a video of its own size, as there; with ``upscale`` the scales begin at the
    area, as they do for larger ones.

    Raises:
        InputError: an unknown size, a portrait without pixels, or one too narrow for any scale to fit.
    """
    first, second = parse_size(size)
    if image_height < 1 or image_width < 1:
        raise InputError(f"portrait is {image_width}x{image_height} px: expected at least one pixel; use another image")
    area = first * second
    fits = [_first_fit(area, image_height, image_width, *_scale_range(area, image_height, image_width))]
    if upscale and image_height * image_width <= area:
        # Near the area both rules may give the same size, or the one above the larger.
        fits.append(_first_fit(area, image_height, image_width, *_shrinking_range(area, image_height, image_width)))
    found = [fit for fit in fits if fit is not None]
    if not found:
        raise InputError(
            f"portrait of {image_width}x{image_height} px (width x height) does not fit size {size!r} at any scale: "
            "expected an aspect closer to a square; crop the portrait or ask for a larger size"
        )
    return max(found, key=math.prod)


def _first_fit(
    area: int, image_height: int, image_width: int, largest: float, smallest: float
) -> tuple[int, int] | None:
    for step in range(SCALE_STEPS):
        scale = largest - (largest - smallest) * step / SCALE_STEPS
        height = round_up(int(image_height * scale), MULTIPLE_PX)
        width = round_up(int(image_width * scale), MULTIPLE_PX)
        if 0 < height * width <= area:
            return height, width
    return None


def _scale_range(area: int, height: int, width: int) -> tuple[float, float]:
    return (1.0, 0.1) if height * width <= area else _shrinking_range(area, height, width)


def _shrinking_range(area: int, height: int, width: int) -> tuple[float, float]:
    """From the scale at which the portrait has the area to the one at which it has it rounded up."""
    slack = MULTIPLE_PX - 1
    a, b, c = height * width, slack * (height + width), slack**2 - area
    # 2ac, not 4ac: not the exact root, but what the published sizes were made with.
    return math.sqrt(area / a), (-b + math.sqrt(b * b - 2 * a * c)) / (2 * a)
