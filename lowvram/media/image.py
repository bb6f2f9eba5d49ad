"""The portrait: read from a file, and made into the tensor that the VAE encodes."""

import logging
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from lowvram_kernels.errors import InputError

logger = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP")
MIN_SIDE_PX = 32
MAX_PIXELS = 89_000_000  # just under Pillow's own warning limit
_SIZE_HINT = f"expected at most {MAX_PIXELS // 1_000_000} megapixels; scale it down, 2000 px a side is plenty"


def load_portrait(path: str | os.PathLike[str]) -> Image.Image:
    """Read a JPEG, PNG or WebP as an upright RGB image of 8 bits a channel.

    The EXIF rotation is applied; transparent pixels are composed on white; 16-bit grey keeps its upper 8 bits. Of an
    animation the first picture is taken. The size is checked from the header, before anything is decoded.

    Raises:
        InputError: missing, not such an image, truncated, a side under 32 px, or more than 89 megapixels.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"portrait {file} is not a file: expected a JPEG, PNG or WebP image; check the path")
    try:
        with warnings.catch_warnings():
            # Sizes that Pillow only warns about are refused by _check_size.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                _check_size(file, image.width, image.height)
                return _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise InputError(f"portrait {file} is too large ({error}): {_SIZE_HINT}") from error
    except UnidentifiedImageError as error:
        raise InputError(f"portrait {file} is not an image: expected JPEG, PNG or WebP; convert it first") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise InputError(f"portrait {file} cannot be read ({error}): expected a whole image; check the file") from error


def _check_size(file: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(f"portrait {file} is {width}x{height} px, {width * height / 1e6:.0f} megapixels: {_SIZE_HINT}")
    if min(width, height) < MIN_SIDE_PX:
        raise InputError(
            f"portrait {file} is {width}x{height} px: expected at least {MIN_SIDE_PX} px a side; use a larger image"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit grey at 255.
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def portrait_tensor(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """Fit a portrait to ``height`` x ``width`` px.

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
    cropped = _centre_crop(_resize_shorter(image.convert("RGB"), min(height, width)), height, width)
    pixels_HWC = torch.from_numpy(np.array(cropped))
    return pixels_HWC.permute(2, 0, 1).contiguous().to(torch.float32).div(255).mul(2).sub(1)


def _resize_shorter(image: Image.Image, side_px: int) -> Image.Image:
    width, height = image.size
    longer = int(side_px * max(width, height) / min(width, height))
    new_size = (side_px, longer) if width <= height else (longer, side_px)
    if new_size == image.size:
        return image
    return image.resize(new_size, Image.Resampling.BILINEAR)


def _centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    if width > image.width or height > image.height:
        image = _pad(image, height, width)
    left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))


def _pad(image: Image.Image, height: int, width: int) -> Image.Image:
    extra_x, extra_y = max(width - image.width, 0), max(height - image.height, 0)
    logger.warning(
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
