"""Colours of pictures of any mode to what the model knows: 8-bit sRGB without transparency.

A picture names them by an ICC profile, or without one: in EXIF, in a PNG's chunks, in an AVIF's or HEIC's nclx box.
"""

import dataclasses
import io
import logging
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms

logger = logging.getLogger(__name__)

_WHITE = (255, 255, 255, 255)
# Of 255: a profile that changes no colour by more is sRGB's own, however it is called.
_SAME_LEVELS = 2
_LATTICE = 9  # levels of each channel that such a profile is tried with
# Chromaticities x, y of red, green, blue and white; ITU-R BT.709 is sRGB's.
BT709 = (0.640, 0.330, 0.300, 0.600, 0.150, 0.060, 0.3127, 0.3290)
# By the numbers of ITU-T H.273, table 2, that files carry.
PRIMARIES = {
    1: BT709,
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, 0.3127, 0.3290),  # BT.2020
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.3127, 0.3290),  # Display P3
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Colours:
    """Chromaticities x, y of red, green, blue and white; ``gamma`` of the curve, None for sRGB's."""

    primaries: Sequence[float] = BT709
    gamma: float | None = None


SRGB = Colours()
ADOBE_RGB = Colours(primaries=(0.640, 0.330, 0.210, 0.710, 0.150, 0.060, 0.3127, 0.3290), gamma=563 / 256)


def to_srgb(image: Image.Image, colours: Colours = SRGB) -> Image.Image:
    """An image of any mode as RGB of 8 bits a channel in sRGB, transparent pixels composed on white.

    Its ICC profile is followed; without one, ``colours``. 16-bit grey keeps its upper 8 bits, floats are read as 0 to 1
    where none is above 1. A profile that cannot be used is said in the log and left out.
    """
    image = _eight_bits(image)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    rgb = _with_profile(image) or image.convert("RGB")
    if not image.info.get("icc_profile") and colours != SRGB:
        rgb = _from_primaries(rgb, colours)
    if alpha is None:
        return rgb
    rgb.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, _WHITE), rgb).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or of floats, which Pillow would clip at 255, as 8 bits."""
    if not image.mode.startswith(("I", "F")):
        return image
    grey = np.asarray(image).astype(np.float64)
    highest = float(np.nanmax(grey, initial=0.0, where=np.isfinite(grey)))
    if image.mode == "F":
        scale = 255.0 if highest <= 1 else 1.0 if highest <= 255 else 255 / highest
        levels = np.nan_to_num(grey * scale, posinf=255).round()
    elif image.mode == "I" and highest <= 255:
        levels = grey
    else:
        levels = grey // 256 if highest <= 65535 else grey * (255 / highest)
    made = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    made.info = dict(image.info)
    return made


def _with_profile(image: Image.Image) -> Image.Image | None:
    """The image in sRGB by its ICC profile; None where it has none, or none that could be used."""
    data = image.info.get("icc_profile")
    if not data and image.mode != "LAB":
        return None
    try:
        # Without one it is a LAB picture, of which it is clear.
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data) if data else ImageCms.createProfile("LAB"))
        given = _as_profiled(image, profile.profile.xcolor_space.strip())
        transform = ImageCms.buildTransform(
            profile,
            ImageCms.createProfile("sRGB"),
            given.mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if given.mode == "RGB" and _changes_nothing(transform):
            return given
        return ImageCms.applyTransform(given, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        logger.warning(
            "the portrait's colour profile cannot be used (%s): its colours are taken as sRGB",
            " ".join(str(error).split()),
        )
        return None


def _as_profiled(image: Image.Image, space: str) -> Image.Image:
    """The image in the mode that a profile of the colour space ``space`` is for."""
    grey, cmyk = image.mode in ("1", "L", "LA", "La"), image.mode == "CMYK"
    if space == "RGB" and not cmyk:
        return image.convert("RGB")
    if space == "GRAY" and grey:
        return image.convert("L")
    if (space == "CMYK" and cmyk) or (space == "Lab" and image.mode == "LAB"):
        return image
    raise ValueError(f"it is for {space}, the picture is {image.mode}")


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    steps = np.linspace(0, 255, _LATTICE).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(_LATTICE, -1, 3)
    made = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform))
    return int(np.abs(made.astype(int) - colours).max()) <= _SAME_LEVELS


def _from_primaries(image: Image.Image, colours: Colours) -> Image.Image:
    """RGB of other primaries, or of another curve, in sRGB; a band of rows at a time."""
    matrix = (np.linalg.inv(_to_xyz(BT709)) @ _to_xyz(colours.primaries)).astype(np.float32)
    levels = np.arange(256) / 255
    linear = (_decoded(levels) if colours.gamma is None else levels**colours.gamma).astype(np.float32)
    pixels_HWC = np.array(image)
    for top in range(0, len(pixels_HWC), 256):
        band = pixels_HWC[top : top + 256]
        band[:] = (_encoded((linear[band] @ matrix.T).clip(0, 1)) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels_HWC)


def _to_xyz(primaries: Sequence[float]) -> NDArray[np.float64]:
    """The matrix of linear RGB to XYZ, white having a luminance of 1."""
    x, y = np.array(primaries[0::2]), np.array(primaries[1::2])
    columns = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])


def _decoded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _encoded(linear: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


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
        inner, interop = exif.get_ifd(ExifTags.IFD.Exif), _interop(exif)
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


def _interop(exif: Image.Exif) -> dict[int, Any]:
    try:
        return exif.get_ifd(ExifTags.IFD.Interop)
    except KeyError:  # up to Pillow 12, of a picture that has none
        return {}


def _known(primaries: tuple[float, ...]) -> Colours:
    """Rounded chromaticities of sRGB are sRGB's."""
    close = all(abs(one - other) < _CLOSE for one, other in zip(primaries, BT709, strict=True))
    return SRGB if close else dataclasses.replace(SRGB, primaries=primaries)
