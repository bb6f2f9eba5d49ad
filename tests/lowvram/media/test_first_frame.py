"""A video as a portrait: the first picture of every container, upright, with square pixels and the right colours."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace
from PIL import Image

from lowvram.media.image import load_portrait, read_portrait
from lowvram_kernels.errors import InputError
from tests.lowvram.media import icc
from tests.lowvram.media.sounds import bursts, write_sound

RED, BLUE = (200, 60, 30), (30, 60, 200)


def write_video(path: Path, codec: str, form: str, pixels: str = "yuv420p", **settings) -> Path:
    """Red over blue, then two grey frames; 128 x 96 px. ``settings`` are the stream's, and ``matrix`` the colours'."""
    height, width = settings.pop("height", 96), settings.pop("width", 128)
    matrix = settings.pop("matrix", None)
    first = np.full((height, width, 3), BLUE, np.uint8)
    first[: height // 2] = RED
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for index, picture in enumerate([first] if form == "image2" else [first, first // 2 + 60, first // 2 + 60]):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format=pixels, dst_colorspace=matrix)
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def check(image: Image.Image, size: tuple[int, int] = (128, 96), tolerance: int = 6) -> None:
    assert (image.mode, image.size) == ("RGB", size)
    for y, colour in ((0.2, RED), (0.8, BLUE)):
        found = image.getpixel((size[0] // 4, round(y * size[1])))
        assert np.abs(np.subtract(found, colour)).max() <= tolerance, (found, colour)


VIDEOS = [
    ("a.mp4", "libx264", "mp4", "yuv420p"), ("a.webm", "libvpx-vp9", "webm", "yuv420p"),
    ("a.mkv", "ffv1", "matroska", "bgr0"), ("a.avi", "mjpeg", "avi", "yuvj420p"),
    ("a.mov", "prores_ks", "mov", "yuva444p10le"), ("a.3gp", "mpeg4", "3gp", "yuv420p"),
    ("a.flv", "flv", "flv", "yuv420p"), ("a.wmv", "wmv2", "asf", "yuv420p"), ("a.h264", "libx264", "h264", "yuv420p"),
    ("a.dpx", "dpx", "image2", "rgb24"), ("a.jls", "jpegls", "image2", "rgb24"),
    ("a.hdr", "hdr", "image2", "gbrpf32le"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "codec", "form", "pixels"), VIDEOS, ids=[row[0] for row in VIDEOS])
def test_the_first_picture(tmp_path: Path, name: str, codec: str, form: str, pixels: str) -> None:
    portrait = read_portrait(write_video(tmp_path / name, codec, form, pixels))
    check(portrait.image, tolerance=16 if name == "a.hdr" else 6)
    assert portrait.facts == {"format": "video", "width": 128, "height": 96}


def fixed(value: float) -> bytes:
    return round(value * 65536).to_bytes(4, "big", signed=True)


@pytest.mark.parametrize(
    ("matrix", "red"),
    [((0, 1, -1, 0), "right"), ((-1, 0, 0, -1), "bottom"), ((0, -1, 1, 0), "left"), ((1, 0, 0, 1), "top")],
)
def test_a_phone_that_was_held_another_way(tmp_path: Path, matrix: tuple, red: str) -> None:
    path = write_video(tmp_path / "a.mp4", "libx264", "mp4")
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16
    a, b, c, d = map(fixed, matrix)
    data[at : at + 36] = a + b + bytes(4) + c + d + bytes(4) + bytes(8) + (1 << 30).to_bytes(4, "big")
    path.write_bytes(data)
    image = load_portrait(path)
    assert image.size == ((96, 128) if red in ("right", "left") else (128, 96))
    turned = {"top": 0, "left": 270, "bottom": 180, "right": 90}[red]
    check(image.rotate(turned, expand=True))


@pytest.mark.parametrize(
    ("matrix", "number", "height"),
    [(Colorspace.ITU709, 1, 96), (Colorspace.ITU601, 6, 96), (Colorspace.ITU709, 2, 720), (Colorspace.ITU601, 2, 480)],
)
def test_the_matrix_that_is_said_or_usual(tmp_path: Path, matrix: Colorspace, number: int, height: int) -> None:
    """``number`` is H.273's; 2 says none: then it is that of HD from 720 rows on."""
    path = write_video(
        tmp_path / "a.mp4", "libx264", "mp4", "yuv444p", height=height, matrix=matrix, colorspace=number, color_range=1
    )
    check(load_portrait(path), (128, height))


def test_square_pixels(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", "libx264", "mp4", sample_aspect_ratio=Fraction(3, 2))
    check(load_portrait(path), (192, 96))


def test_wide_colours(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", "libx264", "mp4", "yuv444p", color_primaries=12, color_trc=13, colorspace=6)
    found = load_portrait(path).getpixel((30, 20))
    assert np.abs(np.subtract(found, icc.in_srgb(RED, icc.DISPLAY_P3))).max() < 12


@pytest.mark.parametrize("curve", [16, 18])
def test_high_dynamic_range_is_said(tmp_path: Path, curve: int, caplog: pytest.LogCaptureFixture) -> None:
    path = write_video(tmp_path / "a.mp4", "libx264", "mp4", color_primaries=9, color_trc=curve, colorspace=9)
    with caplog.at_level(logging.WARNING):
        load_portrait(path)
    assert "high dynamic range" in caplog.text


def test_transparent_pictures_of_a_video_are_white(tmp_path: Path) -> None:
    pixels = np.zeros((96, 128, 4), np.uint8)
    pixels[:, 64:] = (*RED, 255)
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "rgba"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        container.mux(stream.encode(None))
    image = load_portrait(tmp_path / "a.mov")
    assert image.getpixel((20, 50)) == (255, 255, 255)
    assert image.getpixel((100, 50)) == RED


def test_the_picture_on_a_record(tmp_path: Path) -> None:
    """A sound file has no picture; a voice is no portrait."""
    with pytest.raises(InputError, match=r"has no picture|cannot be read"):
        load_portrait(write_sound(tmp_path / "a.m4a", bursts(1, 16000), 16000, "aac", "mp4"))
    with pytest.raises(InputError, match="cannot be read"):
        load_portrait(write_sound(tmp_path / "a.wav", bursts(1, 16000), 16000, "pcm_s16le", "wav"))


@pytest.mark.parametrize(("name", "form"), [("a.mp4", "mp4"), ("a.mkv", "matroska"), ("a.webm", "webm")])
def test_a_cut_video(tmp_path: Path, name: str, form: str) -> None:
    codec = "libvpx-vp9" if form == "webm" else "libx264"
    path = write_video(tmp_path / name, codec, form)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(InputError, match=r"expected JPEG, PNG or WebP"):
        load_portrait(path)


def test_a_video_too_small(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 32 px"):
        load_portrait(write_video(tmp_path / "a.mp4", "libx264", "mp4", height=16, width=64))
