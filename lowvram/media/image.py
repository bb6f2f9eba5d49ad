"""The portrait: read from a file, and made into the tensor that the VAE encodes."""

import dataclasses
import functools
import logging
import os
import struct
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from lowvram.media.colours import stated_colours, to_srgb
from lowvram.media.first_frame import first_frame
from lowvram_kernels.errors import InputError

logger = logging.getLogger(__name__)

MIN_SIDE_PX = 32
MAX_PIXELS = 89_000_000  # just under Pillow's own warning limit
_SIZE_HINT = f"expected at most {MAX_PIXELS // 1_000_000} megapixels; scale it down, 2000 px a side is plenty"
_EXPECTED = "expected JPEG, PNG or WebP, HEIC, or another picture or video"
# What Pillow knows and is not asked for: EPS runs a program on what is in the file, WMF asks Windows, the others are
# known by name only.
_NOT_READ = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")
_NO_PIXELS = {b"%PDF": "a PDF", b"%!PS": "PostScript", b"\xc5\xd0\xd3\xc6": "PostScript", b"<svg": "an SVG"}
# Pictures that none of the libraries here reads.
_NOT_READ_HERE = {
    b"\xff\x0a": "a JPEG XL",
    b"\0\0\0\x0cJXL \r\n\x87\n": "a JPEG XL",
    b"II\xbc": "a JPEG XR",
    b"gimp xcf": "a GIMP file",
    b"FLIF": "a FLIF",
    b"BPG\xfb": "a BPG",
    b"FUJIFILMCCD-RAW": "a camera's raw file",
}
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"mif2", b"msf1", b"avif", b"avis")
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Portrait:
    """``image`` is upright, RGB of 8 bits a channel in sRGB; ``facts`` say for a report what it was."""

    image: Image.Image
    facts: dict[str, Any]


def load_portrait(path: str | os.PathLike[str]) -> Image.Image:
    """The picture of ``read_portrait`` alone."""
    return read_portrait(path).image


def read_portrait(path: str | os.PathLike[str]) -> Portrait:
    """Read a picture that Pillow, pillow-heif or FFmpeg reads as an upright sRGB image of 8 bits a channel.

    Rotation by EXIF or a video's display matrix is applied, the ICC profile is followed, transparent pixels are
    composed on white. Of an animation or a video the first picture is taken. The size is checked from the header,
    before anything is decoded.

    Raises:
        InputError: missing, no picture, truncated, a side under 32 px, or more than 89 megapixels.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"portrait {file} is not a file: {_EXPECTED}; check the path")
    try:
        with warnings.catch_warnings():
            # Sizes that Pillow only warns about are refused by _check_size.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=_formats()) as image:
                return _read(file, image)
    except Image.DecompressionBombError as error:
        raise InputError(f"portrait {file} is too large ({error}): {_SIZE_HINT}") from error
    except UnidentifiedImageError:
        return _of_video(file)
    except _DAMAGE as error:
        words = " ".join(str(error).split())
        raise InputError(f"portrait {file} cannot be read ({words}): expected a whole image; check the file") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    if find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in Image.OPEN if name not in _NOT_READ)


def _read(file: Path, image: Image.Image) -> Portrait:
    _check_size(file, image.width, image.height)
    if image.info.get("default_image"):
        image.seek(1)  # an APNG's picture for programs that show no animation is not part of it
    facts = {"format": image.format, "mode": image.mode, "width": image.width, "height": image.height}
    image.load()
    upright = _upright(file, image)  # first: who reads damaged EXIF data once is not told of it again
    return Portrait(image=to_srgb(upright, stated_colours(file, image)), facts=facts)


def _upright(file: Path, image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _DAMAGE as error:
        logger.warning("portrait %s: its EXIF data cannot be read (%s), it is taken as upright", file, error)
        return image


def _of_video(file: Path) -> Portrait:
    """What Pillow does not know: a video, or what is named in the error."""
    with file.open("rb") as opened:
        head = opened.read(1024)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF:
        # FFmpeg would take one tile of it for the picture.
        missing = "HEIF" not in _formats() and not head[8:12].startswith(b"avi")
        advice = "pip install pillow-heif, which reads it" if missing else "copy it again or export it as a JPEG"
        raise InputError(f"portrait {file} is a HEIC or AVIF that cannot be read: expected a whole one; {advice}")
    for start, name in _NO_PIXELS.items():
        if head.startswith(start) or (start == b"<svg" and head.lstrip().startswith(b"<?xml") and start in head):
            raise InputError(f"portrait {file} is {name}: {_EXPECTED}; export it as a PNG")
    for start, name in _NOT_READ_HERE.items():
        if head.startswith(start):
            raise InputError(f"portrait {file} is {name}, which is not read here: {_EXPECTED}; convert it to PNG")
    image = first_frame(file, _EXPECTED, functools.partial(_check_size, file))
    return Portrait(image=image, facts={"format": "video", "width": image.width, "height": image.height})


def _check_size(file: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(f"portrait {file} is {width}x{height} px, {width * height / 1e6:.0f} megapixels: {_SIZE_HINT}")
    if min(width, height) < MIN_SIDE_PX:
        raise InputError(
            f"portrait {file} is {width}x{height} px: expected at least {MIN_SIDE_PX} px a side; use a larger image"
        )


def portrait_tensor(image: Image.Image, height: int, width: int, *, said: bool = True) -> torch.Tensor:
    """Fit a portrait to ``height`` x ``width`` px; ``said``: whether black around it is.

    The shorter side is resized to ``min(height, width)`` (Pillow, bilinear), then the centre is cropped; where the
    resized image is smaller than the crop it is centred on black, with a warning. Rounding is that of torchvision's
    ``Resize`` and ``CenterCrop``.

    Returns:
        float32 [3, height, width] in [-1, 1].

    Raises:
        ValueError: ``height`` or ``width`` is not positive.
    """
    if height < 1 or width < 1:
        raise ValueError(f"expected a positive height and width, received {height} and {width}")
    pixels_HWC = torch.from_numpy(np.array(fitted(image, height, width, said=said)))
    return pixels_HWC.permute(2, 0, 1).contiguous().to(torch.float32).div(255).mul(2).sub(1)


def fitted(image: Image.Image, height: int, width: int, *, said: bool = True) -> Image.Image:
    """What ``portrait_tensor`` makes of a portrait, as a picture, RGB; ``said``: whether black around it is."""
    return _centre_crop(_resize_shorter(image.convert("RGB"), min(height, width)), height, width, said=said)


def _resize_shorter(image: Image.Image, side_px: int) -> Image.Image:
    width, height = image.size
    longer = int(side_px * max(width, height) / min(width, height))
    new_size = (side_px, longer) if width <= height else (longer, side_px)
    if new_size == image.size:
        return image
    return image.resize(new_size, Image.Resampling.BILINEAR)


def _centre_crop(image: Image.Image, height: int, width: int, *, said: bool) -> Image.Image:
    if width > image.width or height > image.height:
        image = _pad(image, height, width, said=said)
    left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))


def _pad(image: Image.Image, height: int, width: int, *, said: bool) -> Image.Image:
    extra_x, extra_y = max(width - image.width, 0), max(height - image.height, 0)
    logger.log(
        logging.WARNING if said else logging.DEBUG,
        "the portrait's aspect leaves %d black columns and %d black rows in a video of %dx%d px (width x height); "
        "crop it to that aspect to avoid them",
        extra_x,
        extra_y,
        width,
        height,
    )
    padded = Image.new("RGB", (image.width + extra_x, image.height + extra_y))
    padded.paste(image, (extra_x // 2, extra_y // 2))
    return padded
