"""Wide colour that no ICC profile names, but EXIF, a PNG's chunks or an nclx box; and pictures that are not read."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lowvram.media.image import load_portrait
from lowvram_kernels.errors import InputError
from tests.lowvram.media import icc

COLOUR = (200, 80, 60)
P3_AND_WHITE = [0.680, 0.320, 0.265, 0.690, 0.150, 0.060]
SRGB_ROUNDED = [0.64, 0.33, 0.3, 0.6, 0.15, 0.06]
WHITE = [0.3127, 0.329]


def encoded(kind: str, **options: object) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (64, 64), COLOUR).save(made, kind, **options)
    return made.getvalue()


def exif(space: int | None = None, interop: str | None = None, primaries: list[float] | None = None) -> Image.Exif:
    made = Image.Exif()
    if space is not None:
        made.get_ifd(0x8769)[0xA001] = space
    if interop is not None:
        made.get_ifd(0x8769)[0xA005] = {1: interop}
    if primaries is not None:
        made[0x013F], made[0x013E] = primaries, WHITE
    return made


def avif(primaries: int, curve: int = 13) -> bytes:
    data = encoded("AVIF", quality=100, subsampling="4:4:4")
    at = data.index(b"colrnclx") + 8
    return data[:at] + struct.pack(">HH", primaries, curve) + data[at + 4 :]


def png(name: bytes, body: bytes) -> bytes:
    """With a chunk in front of the pixels."""
    data = encoded("PNG")
    at = data.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return data[:at] + chunk + data[at:]


def chrm(primaries: list[float]) -> bytes:
    return struct.pack(">8I", *(round(100_000 * value) for value in [*WHITE, *primaries]))


def seen(tmp_path: Path, data: bytes) -> np.ndarray:
    (tmp_path / "portrait").write_bytes(data)
    return np.asarray(load_portrait(tmp_path / "portrait"))[32, 32].astype(float)


P3, ADOBE = icc.in_srgb(COLOUR, icc.DISPLAY_P3), icc.in_srgb(COLOUR, icc.ADOBE_RGB)
WIDE = {
    "AVIF, Display P3": (lambda: avif(12), P3),
    "AVIF, BT.2020": (lambda: avif(9, 14), icc.in_srgb(COLOUR, ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)))),
    "PNG, cICP of Display P3": (lambda: png(b"cICP", bytes([12, 13, 0, 1])), P3),
    "PNG, cHRM of Display P3": (lambda: png(b"cHRM", chrm(P3_AND_WHITE)), P3),
    "JPEG, EXIF's Adobe RGB by R03": (lambda: encoded("JPEG", quality=100, exif=exif(65535, "R03")), ADOBE),
    "JPEG, EXIF's Adobe RGB by 2": (lambda: encoded("JPEG", quality=100, exif=exif(2)), ADOBE),
    "JPEG, EXIF's primaries": (
        lambda: encoded("JPEG", quality=100, exif=exif(65535, primaries=P3_AND_WHITE)), P3,
    ),
    "WebP, EXIF's Adobe RGB": (lambda: encoded("WEBP", lossless=True, exif=exif(65535, "R03")), ADOBE),
    "TIFF, its primaries": (lambda: encoded("TIFF", tiffinfo=exif(primaries=P3_AND_WHITE)), P3),
}  # fmt: skip
NARROW = {
    "AVIF": lambda: avif(1),
    "AVIF that says nothing": lambda: avif(2, 2),
    "PNG, cHRM of sRGB": lambda: png(b"cHRM", chrm(SRGB_ROUNDED)),
    "PNG, an sRGB chunk": lambda: png(b"sRGB", b"\0"),
    "JPEG, EXIF's sRGB": lambda: encoded("JPEG", quality=100, exif=exif(1, "R98")),
    "JPEG, EXIF's primaries of sRGB": lambda: encoded("JPEG", quality=100, exif=exif(primaries=SRGB_ROUNDED)),
    "JPEG, primaries that are none": lambda: encoded("JPEG", quality=100, exif=exif(primaries=[0.0] * 6)),
}


@pytest.mark.parametrize("kind", WIDE)
def test_wide_colour_is_converted(tmp_path, kind):
    make, expected = WIDE[kind]
    assert np.abs(expected - COLOUR).max() > 10
    assert np.abs(seen(tmp_path, make()) - expected).max() < 8  # whose curve is near sRGB's


@pytest.mark.parametrize("kind", NARROW)
def test_srgb_stays(tmp_path, caplog, kind):
    assert np.abs(seen(tmp_path, NARROW[kind]()) - COLOUR).max() < 5
    assert not caplog.records


def test_an_icc_profile_goes_before_all_of_it(tmp_path):
    profile = icc.rgb_profile(icc.DISPLAY_P3)
    data = encoded("JPEG", quality=100, exif=exif(65535, "R03"), icc_profile=profile)
    assert np.abs(seen(tmp_path, data) - P3).max() < 5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: encoded("JPEG", quality=100, exif=exif(65535)), "says its EXIF"),
        (lambda: encoded("WEBP", lossless=True, exif=exif(65535)), "says its EXIF"),
        (lambda: avif(9, 16), "high dynamic range (PQ)"),
        (lambda: png(b"cICP", bytes([9, 18, 0, 1])), "high dynamic range (HLG)"),
        (lambda: avif(4), "colour primaries of number 4"),
    ],
)
def test_what_is_not_known_is_said_in_one_line(tmp_path, caplog, make, words):
    with caplog.at_level(logging.WARNING):
        assert np.abs(seen(tmp_path, make()) - COLOUR).max() < 5
    (record,) = caplog.records
    assert words in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\xff\x0a\xfa\x1f", "a JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl ", "a JPEG XL"),
        (b"II\xbc\x01", "a JPEG XR"),
        (b"gimp xcf v011", "a GIMP file"),
        (b"BPG\xfb", "a BPG"),
        (b"FLIF", "a FLIF"),
    ],
)
def test_pictures_that_are_not_read_are_named_with_what_to_do(tmp_path, head, name):
    (tmp_path / "portrait").write_bytes(head + bytes(2000))
    with pytest.raises(InputError, match=f"is {name}, .*convert it to PNG"):
        load_portrait(tmp_path / "portrait")
