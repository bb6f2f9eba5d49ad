"""The first picture of a video, or of an image that only FFmpeg reads, upright and with square pixels."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace
from PIL import Image

from lowvram.media.colours import BT709, PRIMARIES, Colours, to_srgb
from lowvram.media.containers import WITH_PICTURES, open_media, reason
from lowvram_kernels.errors import InputError

logger = logging.getLogger(__name__)

_HD_ROWS = 720  # from here on a video that does not say its matrix has that of HD
_MOST_BAD_PACKETS = 100  # of a file that was cut at its start
# Numbers of ITU-T H.273 that files carry.
_UNSPECIFIED = 2
_HDR_CURVES = {16: "PQ", 18: "HLG"}


def first_frame(path: Path, expected: str, check_size: Callable[[int, int], None]) -> Image.Image:
    """The first picture that decodes, RGB; ``check_size`` hears width and height before anything is decoded.

    Raises:
        InputError: missing, no format with pictures, or none decodes.
    """
    with open_media(path, WITH_PICTURES, "portrait", expected) as container:
        if not container.streams.video:
            raise InputError(f"portrait {path} has no picture: {expected}; choose another file")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise InputError(
                f"portrait {path} cannot be decoded: there is no decoder for it; {expected}, convert it first"
            )
        check_size(stream.width, stream.height)
        frame = _decode(path, container, expected)
        shape = stream.sample_aspect_ratio
        return _upright(_to_image(frame), frame.rotation, float(shape) if shape else 1.0)


def _decode(path: Path, container: InputContainer, expected: str) -> VideoFrame:
    bad = 0
    try:
        for packet in container.demux(video=0):
            try:
                for frame in packet.decode():
                    return frame
            except (av.FFmpegError, OSError) as error:
                bad += 1
                if bad > _MOST_BAD_PACKETS:
                    raise InputError(f"portrait {path} does not decode ({reason(error)}): {expected}") from error
    except (av.FFmpegError, OSError) as error:
        raise InputError(
            f"portrait {path} breaks off ({reason(error)}): expected a whole file; copy it again"
        ) from error
    raise InputError(f"portrait {path} holds no picture that decodes: {expected}; check the file")


def _to_image(frame: VideoFrame) -> Image.Image:
    colours: dict[str, Any] = {}
    if int(frame.colorspace) == _UNSPECIFIED:
        hd = frame.height >= _HD_ROWS and not frame.format.name.startswith("yuvj")  # which is JPEG's
        colours["src_colorspace"] = Colorspace.ITU709 if hd else Colorspace.ITU601
    kind = "rgba" if any(component.is_alpha for component in frame.format.components) else "rgb24"
    pixels = frame.reformat(format=kind, **colours).to_ndarray()
    curve = _HDR_CURVES.get(int(frame.color_trc))
    if curve is not None:
        logger.warning("the portrait is high dynamic range (%s): it may look pale, export it as SDR", curve)
    primaries = PRIMARIES.get(int(frame.color_primaries), BT709)
    stated = Colours(primaries=BT709 if curve else primaries)
    return to_srgb(Image.fromarray(np.ascontiguousarray(pixels)), stated)


def _upright(image: Image.Image, rotation: int, pixel_shape: float) -> Image.Image:
    """Turned by ``rotation`` degrees counter-clockwise, as the file's display matrix says; pixels that are
    ``pixel_shape`` times as wide as high are made square."""
    if pixel_shape > 0 and pixel_shape != 1:
        size = (max(1, round(image.width * pixel_shape)), image.height)
        image = image.resize(size, Image.Resampling.BICUBIC)
    turns = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    turn = turns.get(rotation % 360)
    return image if turn is None else image.transpose(turn)
