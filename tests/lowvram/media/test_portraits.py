"""Portraits as phones, cameras, programs and the web hand them out: formats, turns, depths, profiles, transparency."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms

from lowvram.media import image as image_module
from lowvram.media.image import load_portrait, read_portrait
from lowvram_kernels.errors import InputError
from tests.lowvram.media import icc

pillow_heif.register_heif_opener()
CASES = Path(__file__).parent / "cases"
RED, BLUE = (200, 60, 30), (30, 60, 200)


def red_over_blue(width: int = 48, height: int = 64) -> Image.Image:
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (0, height // 2, width, height))
    return image


def near(image: Image.Image, at: tuple[int, int], colour, tolerance: float = 4) -> bool:
    return bool(np.abs(np.subtract(image.getpixel(at), colour)).max() <= tolerance)


@pytest.mark.parametrize(("name", "size"), [("iphone.heic", (384, 384)), ("p.avif", (384, 384)), ("p64.png", (64, 64))])
def test_what_phones_and_the_web_hand_out(name: str, size: tuple[int, int]) -> None:
    portrait = read_portrait(CASES / name)
    assert (portrait.image.mode, portrait.image.size) == ("RGB", size)
    pixels = np.asarray(portrait.image).astype(float)
    assert pixels.mean(axis=(0, 1)) == pytest.approx([143.4, 147.8, 154.6], abs=2)
    assert portrait.facts["format"] == {"h": "HEIF", "a": "AVIF", "p": "PNG"}[name.split(".")[1][0]]


FORMATS = [
    "a.heic", "a.avif", "a.bmp", "a.gif", "a.tif", "a.jp2", "a.tga", "a.ppm", "a.qoi", "a.ico", "a.pcx", "a.dds",
    "a.sgi", "a.icns",
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_pillow(tmp_path: Path, name: str) -> None:
    options = {"sizes": [(64, 64)]} if name == "a.ico" else {"quality": 95} if name in ("a.heic", "a.avif") else {}
    red_over_blue(64, 64).save(tmp_path / name, **options)
    image = load_portrait(tmp_path / name)
    assert image.mode == "RGB"
    assert image.width == image.height >= 64
    assert near(image, (10, image.height // 8), RED)
    assert near(image, (10, image.height * 7 // 8), BLUE)


MOVING: list[tuple[str, dict]] = [
    ("a.gif", {}), ("a.png", {}), ("b.png", {"default_image": True}), ("a.webp", {"lossless": True}),
    ("a.avif", {"quality": 95}), ("a.tif", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), MOVING)
def test_the_first_picture_of_moving_ones(tmp_path: Path, name: str, options: dict) -> None:
    pictures = [red_over_blue(), Image.new("RGB", (48, 64), (0, 255, 0)), Image.new("RGB", (48, 64), (9, 9, 9))]
    if options.get("default_image"):  # which stands in front, for programs that show no animation
        pictures.insert(0, Image.new("RGB", (48, 64), (255, 255, 0)))
    pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=100, **options)
    assert getattr(Image.open(tmp_path / name), "n_frames", 1) >= 3
    image = load_portrait(tmp_path / name)
    assert near(image, (10, 10), RED)
    assert near(image, (10, 55), BLUE)


TURNS = {1: (24, 5), 2: (24, 5), 3: (24, 58), 4: (24, 58), 5: (5, 24), 6: (58, 24), 7: (58, 24), 8: (5, 24)}


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.avif", "a.jpg"])
@pytest.mark.parametrize(("orientation", "red_at"), TURNS.items())
def test_exif_orientation(tmp_path: Path, name: str, orientation: int, red_at: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    red_over_blue().save(tmp_path / name, exif=exif, quality=95)
    image = load_portrait(tmp_path / name)
    assert image.size == ((48, 64) if orientation < 5 else (64, 48))
    assert near(image, red_at, RED, 8)
    assert near(image, (image.width - 1 - red_at[0], image.height - 1 - red_at[1]), BLUE, 8)


@pytest.mark.parametrize(("orientation", "red_at"), [(3, (24, 58)), (6, (58, 24)), (8, (5, 24))])
def test_a_heic_is_turned_once(tmp_path: Path, orientation: int, red_at: tuple[int, int]) -> None:
    """A phone notes the turn twice, in the picture's own properties and in EXIF."""
    exif, image = Image.Exif(), red_over_blue()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    image.save(tmp_path / "a.heic", quality=95)
    assert near(load_portrait(tmp_path / "a.heic"), red_at, RED, 8)


JUNK = b"Exif\0\0XXjunkjunk"
BROKEN_EXIF: list[tuple[str, bytes, bool]] = [
    ("a.png", JUNK, True), ("a.webp", JUNK, True), ("a.jpg", JUNK, False), ("b.webp", b"Exif\0\0", False),
    ("b.png", b"Exif\0\0MM\0*\xff\xff\xff\xff", False),
    ("b.jpg", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0", False),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(("name", "exif", "said"), BROKEN_EXIF)
def test_a_picture_with_broken_exif_data_is_read(tmp_path: Path, name: str, exif: bytes, said: bool, caplog) -> None:
    red_over_blue().save(tmp_path / name, exif=exif, quality=95)
    with caplog.at_level(logging.WARNING):
        assert near(load_portrait(tmp_path / name), (10, 10), RED, 8)
    assert ("EXIF data cannot be read" in caplog.text) == said


def with_alpha(mode: str) -> Image.Image:
    """Left half transparent, right half RED (or its grey)."""
    image = Image.new("RGBA", (64, 64), (*RED, 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    if mode in ("LA", "La"):
        return image.convert("LA").convert(mode)
    if mode == "P":
        palette = Image.new("P", (64, 64), 1)
        palette.putpalette([0, 0, 0, *RED])
        palette.paste(0, (0, 0, 32, 64))
        return palette
    return image


TRANSPARENT = [
    ("a.png", "RGBA", {}), ("b.png", "LA", {}), ("c.png", "P", {"transparency": 0}), ("a.tif", "RGBA", {}),
    ("a.gif", "P", {"transparency": 0}), ("a.webp", "RGBA", {"lossless": True}), ("a.tga", "RGBA", {}),
    ("a.avif", "RGBA", {"quality": 95}), ("a.heic", "RGBA", {"quality": 95}), ("a.qoi", "RGBA", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mode", "options"), TRANSPARENT, ids=[row[0] for row in TRANSPARENT])
def test_transparent_pixels_are_white(tmp_path: Path, name: str, mode: str, options: dict) -> None:
    with_alpha(mode).save(tmp_path / name, **options)
    image = load_portrait(tmp_path / name)
    assert near(image, (10, 32), (255, 255, 255), 2)
    grey = Image.new("RGB", (1, 1), RED).convert("L").getpixel((0, 0))
    assert near(image, (54, 32), [grey] * 3 if mode == "LA" else RED)


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    Image.new("RGBA", (64, 64), (*RED, 128)).save(tmp_path / "a.png")
    assert near(load_portrait(tmp_path / "a.png"), (5, 5), [(255 + value) / 2 for value in RED], 1)


RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))
DEPTHS: dict[str, tuple[str, Image.Image]] = {
    "16-bit grey PNG": ("a.png", Image.fromarray((RAMP * 65535).astype(np.uint16))),
    "16-bit grey TIFF": ("a.tif", Image.fromarray((RAMP * 65535).astype(np.uint16))),
    "16-bit grey JPEG 2000": ("a.jp2", Image.fromarray((RAMP * 65535).astype(np.uint16))),
    "32-bit TIFF of 16 bits": ("a.tif", Image.fromarray((RAMP * 65535).astype(np.int32))),
    "32-bit TIFF of 8 bits": ("a.tif", Image.fromarray((RAMP * 255).astype(np.int32))),
    "32-bit TIFF of 20 bits": ("a.tif", Image.fromarray((RAMP * 2**20).astype(np.int32))),
    "float TIFF up to 1": ("a.tif", Image.fromarray(RAMP.astype(np.float32))),
    "float TIFF up to 255": ("a.tif", Image.fromarray((RAMP * 255).astype(np.float32))),
    "float TIFF beyond": ("a.tif", Image.fromarray((RAMP * 4000).astype(np.float32))),
    "16-bit PGM": ("a.pgm", Image.fromarray((RAMP * 65535).astype(np.uint16))),
    "8-bit grey": ("a.jpg", Image.fromarray((RAMP * 255).astype(np.uint8))),
}


@pytest.mark.parametrize(("name", "picture"), DEPTHS.values(), ids=DEPTHS)
def test_depths_keep_their_range(tmp_path: Path, name: str, picture: Image.Image) -> None:
    picture.save(tmp_path / name)
    pixels = np.asarray(load_portrait(tmp_path / name))
    assert pixels.shape == (64, 64, 3)
    np.testing.assert_allclose(pixels[32, :, 1], RAMP[0] * 255, atol=4)


def test_sixteen_bits_of_three_channels(tmp_path: Path) -> None:
    """Which Pillow does not write."""
    import av

    levels = np.zeros((64, 64, 3), np.uint16)
    levels[:] = np.array(RED) * 257
    with av.open(str(tmp_path / "a.png"), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb48be"
        frame = av.VideoFrame.from_ndarray(levels, format="rgb48le").reformat(format="rgb48be")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert near(load_portrait(tmp_path / "a.png"), (30, 30), RED, 1)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.avif", "a.heic"])
def test_a_profile_is_followed(tmp_path: Path, name: str) -> None:
    lossless = {"quality": 100} if name != "a.webp" else {"lossless": True}
    red_over_blue().save(tmp_path / name, icc_profile=icc.rgb_profile(icc.DISPLAY_P3), **lossless)
    image = load_portrait(tmp_path / name)
    assert near(image, (10, 10), icc.in_srgb(RED, icc.DISPLAY_P3), 5)
    assert near(image, (10, 55), icc.in_srgb(BLUE, icc.DISPLAY_P3), 5)
    assert not near(image, (10, 10), RED, 10)


@pytest.mark.parametrize(
    ("primaries", "gamma"), [(icc.DISPLAY_P3, 2.2), (icc.ADOBE_RGB, 2.2), (icc.SRGB, 1.0), (icc.SRGB, 1.8)]
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_profiles_of_every_mode(tmp_path: Path, mode: str, primaries: tuple, gamma: float) -> None:
    image = Image.new("RGB", (64, 64), (120, 150, 90)).convert(mode, palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / "a.png", icc_profile=icc.rgb_profile(primaries, gamma))
    assert near(load_portrait(tmp_path / "a.png"), (10, 10), icc.in_srgb((120, 150, 90), primaries, gamma), 2)


def test_the_profile_of_srgb_changes_no_pixel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(np.asarray(load_portrait(tmp_path / "a.png")), pixels)


def test_grey_with_profiles(tmp_path: Path) -> None:
    grey = Image.new("L", (64, 64), 100)
    grey.save(tmp_path / "a.png", icc_profile=icc.grey_profile(1.0))
    assert near(load_portrait(tmp_path / "a.png"), (5, 5), icc.in_srgb((100,) * 3, icc.SRGB, 1.0), 2)
    grey.save(tmp_path / "b.png", icc_profile=icc.rgb_profile(icc.SRGB, 1.0))
    assert near(load_portrait(tmp_path / "b.png"), (5, 5), icc.in_srgb((100,) * 3, icc.SRGB, 1.0), 2)


UNUSABLE: dict[str, tuple[str, bytes]] = {
    "noise": ("RGB", b"no profile at all" * 20),
    "cut": ("RGB", icc.rgb_profile(icc.DISPLAY_P3)[:200]),
    "of grey for colours": ("RGB", icc.grey_profile(2.2)),
    "of RGB for ink": ("CMYK", icc.rgb_profile(icc.DISPLAY_P3)),
    "one byte": ("L", b"x"),
}


@pytest.mark.parametrize(("mode", "profile"), UNUSABLE.values(), ids=UNUSABLE)
def test_profiles_that_cannot_be_used_are_said(tmp_path: Path, mode: str, profile: bytes, caplog) -> None:
    red_over_blue().convert(mode).save(tmp_path / "a.tif", icc_profile=profile)
    with caplog.at_level(logging.WARNING):
        image = load_portrait(tmp_path / "a.tif")
    assert "colour profile cannot be used" in caplog.text
    assert image.mode == "RGB"
    assert mode == "L" or near(image, (10, 10), RED, 6)


def test_a_heic_that_names_its_primaries_only(tmp_path: Path) -> None:
    """As phones write that have no ICC profile in their pictures."""
    pillow_heif.options.SAVE_NCLX_PROFILE = True
    heif = pillow_heif.from_pillow(red_over_blue())
    heif.save(tmp_path / "a.heic", quality=100, color_primaries=12, transfer_characteristics=13)
    assert Image.open(tmp_path / "a.heic").info["nclx_profile"]["color_primaries"] == 12
    image = load_portrait(tmp_path / "a.heic")
    assert near(image, (10, 10), icc.in_srgb(RED, icc.DISPLAY_P3), 8)
    assert not near(image, (10, 10), RED, 10)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "RGBX"])
def test_modes(tmp_path: Path, mode: str) -> None:
    white = Image.new("RGB", (64, 64), (255, 255, 255))
    made = ImageCms.profileToProfile(
        white, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    ) if mode == "LAB" else white.convert(mode)  # fmt: skip
    # Pillow 12 cannot read YCbCr again that it wrote uncompressed; scanners compress it.
    made.save(tmp_path / "a.tif", compression="tiff_lzw" if mode == "YCbCr" else None)
    image = load_portrait(tmp_path / "a.tif")
    assert image.mode == "RGB"
    assert near(image, (20, 20), (255, 255, 255), 3)


@pytest.mark.parametrize("name", ["iphone.heic", "p.avif"])
def test_a_tile_is_not_taken_for_the_picture(tmp_path: Path, name: str) -> None:
    """FFmpeg reads parts of what Pillow and pillow-heif refuse."""
    (tmp_path / name).write_bytes((CASES / name).read_bytes()[:600])
    with pytest.raises(InputError, match=r"cannot be read.*expected a whole (one|image)"):
        load_portrait(tmp_path / name)


def test_without_pillow_heif_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    formats = tuple(name for name in image_module._formats() if name != "HEIF")
    monkeypatch.setattr(image_module, "_formats", lambda: formats)
    with pytest.raises(InputError, match="pip install pillow-heif"):
        load_portrait(CASES / "iphone.heic")
    assert load_portrait(CASES / "p.avif").size == (384, 384)


NO_PIXELS: dict[str, bytes] = {
    "a.svg": b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg' width='64' height='64'/>",
    "b.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='64' height='64'/>",
    "a.pdf": b"%PDF-1.7\n%...",
    "a.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n",
    "b.eps": b"\xc5\xd0\xd3\xc6" + bytes(100),
}


@pytest.mark.parametrize(("name", "content"), NO_PIXELS.items())
def test_pages_and_drawings_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"is (a PDF|PostScript|an SVG): .* export it as a PNG"):
        load_portrait(tmp_path / name)


def test_nothing_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand EPS to Ghostscript."""
    import subprocess

    def run(*arguments: object, **options: object) -> None:
        raise AssertionError(f"ran {arguments}")

    for name in ("run", "Popen", "check_call", "call"):
        monkeypatch.setattr(subprocess, name, run)
    (tmp_path / "a.png").write_bytes(NO_PIXELS["a.eps"])
    with pytest.raises(InputError, match="PostScript"):
        load_portrait(tmp_path / "a.png")


@pytest.mark.parametrize(
    "text", ["Words.\n" * 200, "\x1b[31mred\x1b[0m\n" * 200, "ffconcat version 1.0\nfile 'a.png'\n"]
)
@pytest.mark.parametrize("name", ["a.txt", "a.nfo", "a.ans", "a.jpg"])
def test_text_is_no_picture(tmp_path: Path, name: str, text: str) -> None:
    red_over_blue().save(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="expected JPEG, PNG or WebP"):
        load_portrait(tmp_path / name)


def test_numbered_pictures_are_not_a_sequence(tmp_path: Path) -> None:
    """FFmpeg would read other files by a pattern."""
    red_over_blue().save(tmp_path / "a1.png")
    (tmp_path / "a%d.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        load_portrait(tmp_path / "a%d.png")
