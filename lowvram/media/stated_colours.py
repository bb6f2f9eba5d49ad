"""Colours that a picture names without an ICC profile: in EXIF, in a PNG's chunks, in an AVIF's or HEIC's nclx box."""

import dataclasses
import logging
import struct
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from lowvram.media.colours import ADOBE_RGB, BT709, PRIMARIES, SRGB, Colours

logger = logging.getLogger(__name__)

_UNSPECIFIED = 2
_HDR_CURVES = {16: "PQ", 18: "HLG"}
# What is looked for lies in front of the pixels.
_HEAD_BYTES = 1 << 16
# What EXIF's ColorSpace says.
_SRGB, _ADOBE, _UNCALIBRATED = 1, 2, 65535
_CLOSE = 0.003  # between chromaticities that are one, rounded


def stated_colours(file: Path, image: Image.Image) -> Colours:
    """Primaries and curve that ``image``, opened from ``file``, says it has; those of sRGB where it says nothing.

    What is said and cannot be followed (a curve of high dynamic range, EXIF's "uncalibrated" that names no primaries)
    stands in the log in one line, and the colours are taken as sRGB. An ICC profile goes before all of it: where there
    is one, nothing is looked for.
    """
    if image.info.get("icc_profile"):
        return SRGB
    numbers = _of_heif(image) or _in_file(file, image.format)
    if numbers is not None:
        return _by_number(file, *numbers)
    chromaticity = image.info.get("chromaticity")
    if chromaticity and "srgb" not in image.info:
        white, rest = tuple(chromaticity[:2]), tuple(chromaticity[2:8])
        return _known((*rest, *white))
    return _of_exif(file, image)


def _of_heif(image: Image.Image) -> tuple[int, int] | None:
    nclx: dict[str, Any] = image.info.get("nclx_profile") or {}
    if not nclx:
        return None
    return int(nclx.get("color_primaries", _UNSPECIFIED)), int(nclx.get("transfer_characteristics", _UNSPECIFIED))


def _in_file(file: Path, kind: str | None) -> tuple[int, int] | None:
    """Numbers of ITU-T H.273 for primaries and curve, of kinds whose Pillow reader does not tell them."""
    if kind not in ("AVIF", "PNG"):
        return None
    with file.open("rb") as opened:
        head = opened.read(_HEAD_BYTES)
    if kind == "AVIF":
        at = head.find(b"colrnclx")
        return struct.unpack_from(">HH", head, at + 8) if 0 <= at <= len(head) - 12 else None
    at = head.find(b"\0\0\0\x04cICP", 0, max(head.find(b"IDAT"), 0))
    return (head[at + 8], head[at + 9]) if at >= 0 else None


def _by_number(file: Path, primaries: int, curve: int) -> Colours:
    if curve in _HDR_CURVES:
        logger.warning(
            "portrait %s is high dynamic range (%s): it may look pale, export it as SDR", file, _HDR_CURVES[curve]
        )
        return SRGB
    if primaries not in PRIMARIES and primaries != _UNSPECIFIED:
        logger.warning("portrait %s has colour primaries of number %d, taken as sRGB's", file, primaries)
    return Colours(primaries=PRIMARIES.get(primaries, BT709))


def _of_exif(file: Path, image: Image.Image) -> Colours:
    try:
        exif = image.getexif()
        inner, interop = exif.get_ifd(ExifTags.IFD.Exif), exif.get_ifd(ExifTags.IFD.Interop)
        space, index = inner.get(ExifTags.Base.ColorSpace), str(interop.get(1, ""))
        given = [*exif.get(ExifTags.Base.PrimaryChromaticities, ()), *exif.get(ExifTags.Base.WhitePoint, ())]
        values = tuple(float(value) for value in given)
    except (OSError, SyntaxError, ValueError, TypeError, ZeroDivisionError, struct.error):
        return SRGB  # what is broken there is said where the picture is turned upright
    if space == _ADOBE or (space != _SRGB and index.strip("\0 ") == "R03"):
        return ADOBE_RGB
    if space != _SRGB and len(values) == 8 and all(0 < value < 1 for value in values):
        return _known(values)
    if space == _UNCALIBRATED:
        logger.warning(
            "portrait %s is not in sRGB, says its EXIF, and not in what: it is taken as sRGB; export it in sRGB where "
            "its colours are off",
            file,
        )
    return SRGB


def _known(primaries: tuple[float, ...]) -> Colours:
    """Rounded chromaticities of sRGB are sRGB's."""
    close = all(abs(one - other) < _CLOSE for one, other in zip(primaries, BT709, strict=True))
    return SRGB if close else dataclasses.replace(SRGB, primaries=primaries)
