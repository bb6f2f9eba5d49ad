"""Portraits: formats, orientation, transparency, every refusal, and the crop."""

import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lowvram.media.image import load_portrait, portrait_tensor
from lowvram_kernels.errors import InputError

RED, GREEN = (250, 10, 10), (10, 250, 10)


def red_over_green(width: int = 48, height: int = 64) -> Image.Image:
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (0, height // 2, width, height))
    return image


def near(pixel: object, colour: tuple[int, ...], tolerance: int = 12) -> bool:
    return bool(np.abs(np.subtract(pixel, colour)).max() <= tolerance)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_formats(tmp_path: Path, name: str) -> None:
    red_over_green().save(tmp_path / name, quality=95)
    image = load_portrait(tmp_path / name)
    assert (image.mode, image.size) == ("RGB", (48, 64))
    assert near(image.getpixel((24, 10)), RED)
    assert near(image.getpixel((24, 54)), GREEN)


@pytest.mark.parametrize(
    ("orientation", "size", "red_at"),
    [(1, (48, 64), (24, 5)), (3, (48, 64), (24, 58)), (6, (64, 48), (58, 24)), (8, (64, 48), (5, 24))],
)
def test_exif_rotation(tmp_path: Path, orientation: int, size: tuple[int, int], red_at: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    red_over_green().save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = load_portrait(tmp_path / "a.jpg")
    assert image.size == size
    assert near(image.getpixel(red_at), RED)
    assert near(image.getpixel((size[0] - 1 - red_at[0], size[1] - 1 - red_at[1])), GREEN)


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_transparency_becomes_white(tmp_path: Path, name: str) -> None:
    image = Image.new("RGBA", (40, 40), (*RED, 255))
    image.paste((0, 0, 0, 0), (0, 0, 20, 40))
    image.save(tmp_path / name, lossless=True)
    loaded = load_portrait(tmp_path / name)
    assert loaded.getpixel((5, 20)) == (255, 255, 255)
    assert loaded.getpixel((35, 20)) == RED


def test_transparent_palette_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([*RED, *GREEN])
    image.paste(1, (20, 0, 40, 40))
    image.save(tmp_path / "a.png", transparency=0)
    loaded = load_portrait(tmp_path / "a.png")
    assert loaded.getpixel((5, 20)) == (255, 255, 255)
    assert loaded.getpixel((35, 20)) == GREEN


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (64, 1))).save(tmp_path / "a.png")
    loaded = np.asarray(load_portrait(tmp_path / "a.png"))
    assert loaded.shape == (64, 64, 3)
    np.testing.assert_array_equal(loaded[0, :, 0], ramp >> 8)


@pytest.mark.parametrize(("mode", "name"), [("L", "a.png"), ("1", "a.png"), ("L", "a.jpg"), ("CMYK", "a.jpg")])
def test_other_modes(tmp_path: Path, mode: str, name: str) -> None:
    Image.new("RGB", (40, 40), (255, 255, 255)).convert(mode).save(tmp_path / name)
    loaded = load_portrait(tmp_path / name)
    assert loaded.mode == "RGB"
    assert near(loaded.getpixel((20, 20)), (255, 255, 255))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a file"):
        load_portrait(tmp_path / "none.png")
    with pytest.raises(InputError, match="not a file"):
        load_portrait(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a picture at all", b"\x89PNG\r\n\x1a\n"])
def test_not_an_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"expected"):
        load_portrait(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.tif", "a.bmp", "a.avif", "a.heic"])
def test_truncated(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="portrait"):
        load_portrait(tmp_path / name)


@pytest.mark.parametrize("size", [(1, 1), (31, 500), (500, 31)])
def test_too_small(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="at least 32 px"):
        load_portrait(tmp_path / "a.png")


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_too_many_pixels_are_refused_from_the_header(tmp_path: Path, side: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    # The pixels are missing: a loader that decoded before it checked would call the file truncated.
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(InputError, match="at most 89 megapixels"):
        load_portrait(tmp_path / "a.png")


def test_tensor_range_and_layout() -> None:
    image = Image.new("RGB", (96, 64), (0, 255, 51))
    tensor = portrait_tensor(image, 64, 96)
    assert (tensor.dtype, tuple(tensor.shape), tensor.is_contiguous()) == (torch.float32, (3, 64, 96), True)
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([-1.0, 1.0, -0.6]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "resized", "crop"),
    [
        # resized is (shorter side, int(shorter * long / short)); crop is (left, top), halves rounded to even
        ((400, 720), (448, 806), (0, 19)),
        ((720, 400), (806, 448), (19, 0)),
        ((333, 336), (448, 452), (0, -158)),
        ((201, 103), (874, 448), (53, 0)),
        ((448, 769), (448, 769), (0, 0)),
        ((448, 771), (448, 771), (0, 2)),
    ],
)
def test_resize_and_crop_rounding(size: tuple[int, int], resized: tuple[int, int], crop: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    width, height = (448, 768) if size[1] > size[0] else (768, 448)
    made = ((portrait_tensor(image, height, width) + 1) / 2 * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    whole = np.asarray(image.resize(resized, Image.Resampling.BILINEAR))
    left, top = crop
    if top < 0:
        np.testing.assert_array_equal(made[-top : -top + resized[1]], whole)
    else:
        np.testing.assert_array_equal(made, whole[top : top + height, left : left + width])


def test_black_where_the_aspect_differs(caplog: pytest.LogCaptureFixture) -> None:
    image = Image.new("RGB", (1080, 1920), (255, 255, 255))
    with caplog.at_level(logging.WARNING):
        tensor = portrait_tensor(image, 832, 448)
    rows = tensor.mean(dim=(0, 2))
    assert (rows == -1).nonzero().flatten().tolist() == [*range(18), *range(814, 832)]
    assert "36 black rows" in caplog.text


def test_same_size_is_untouched() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    tensor = portrait_tensor(Image.fromarray(pixels), 128, 192)
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 * 2 - 1
    assert torch.equal(tensor, expected)


def test_tensor_needs_a_size() -> None:
    with pytest.raises(ValueError, match="positive"):
        portrait_tensor(Image.new("RGB", (64, 64)), 0, 64)
