"""The table of sizes, and what is not a size."""

import json
from pathlib import Path

import pytest

from lowvram.media.sizes import output_size, parse_size
from lowvram_kernels.errors import InputError

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
ROWS = json.loads((GOLDEN / "sizes.json").read_text())


def test_every_golden_row() -> None:
    made = [list(output_size(row["size"], row["image_height"], row["image_width"])) for row in ROWS]
    assert len(ROWS) > 50
    assert made == [row["out"] for row in ROWS]


@pytest.mark.parametrize("text", ["704*384", "704x384", "704X384", " 704 * 384 "])
def test_both_signs_are_read(text: str) -> None:
    assert parse_size(text) == (704, 384)


@pytest.mark.parametrize(
    "text", ["", "704", "704*", "*384", "704*-384", "704*384*2", "large", "7.5*8", "0*384", "704,384", "٧٠٤*384"]
)
def test_malformed_sizes_name_examples(text: str) -> None:
    with pytest.raises(InputError, match=r"unknown size .*704\*384"):
        parse_size(text)


@pytest.mark.parametrize("text", ["127*128", "1921*1088", "99999*99999"])
def test_sizes_out_of_range(text: str) -> None:
    with pytest.raises(InputError, match="area"):
        parse_size(text)


@pytest.mark.parametrize("text", ["128*128", "1920*1088"])
def test_bounds_are_allowed(text: str) -> None:
    assert output_size(text, 500, 500)[0] % 64 == 0


@pytest.mark.parametrize(("height", "width"), [(31, 1), (480, 832), (3000, 5000), (40, 6000), (6000, 40), (512, 513)])
def test_area_is_kept(height: int, width: int) -> None:
    made = output_size("384*256", height, width)
    assert made[0] * made[1] <= 384 * 256
    assert min(made) >= 64
    assert made[0] % 64 == made[1] % 64 == 0


def test_no_scale_fits_a_thread() -> None:
    with pytest.raises(InputError, match="does not fit"):
        output_size("128*192", 64, 100_000)


def test_no_pixels() -> None:
    with pytest.raises(InputError, match="at least one pixel"):
        output_size("704*384", 0, 10)
