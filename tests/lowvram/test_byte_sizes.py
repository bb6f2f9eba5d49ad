"""Amounts of memory as people write them, everywhere that one is asked for."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from lowvram.byte_sizes import parse_bytes
from lowvram.cli import main
from lowvram_kernels.errors import ConfigError

MIB, GIB = 2**20, 2**30


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("22.15GiB", int(22.15 * GIB)),
        ("22.15gib", int(22.15 * GIB)),
        ("16 GiB", 16 * GIB),
        ("16g", 16 * GIB),
        ("16G", 16 * GIB),
        ("16 Gi", 16 * GIB),
        ("16GB", 16 * 10**9),
        (" 24 gb ", 24 * 10**9),
        ("16384MiB", 16 * GIB),
        ("512m", 512 * MIB),
        (".5t", 512 * GIB),
        ("17179869184B", 16 * GIB),
        ("17179869184 bytes", 16 * GIB),
        ("16", 16 * GIB),
        ("22.", 22 * GIB),
        ("22.15", int(22.15 * GIB)),
    ],
)
def test_amounts_are_read(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("16 cats", ["no amount of memory", "22.15GiB"]),
        ("much", ["no amount of memory"]),
        ("", ["no amount of memory"]),
        ("-16", ["no amount of memory"]),
        ("-16GiB", ["no amount of memory"]),
        ("nan", ["no amount of memory"]),
        ("inf GiB", ["no amount of memory"]),
        ("1e9", ["no amount of memory"]),
        ("16,5GiB", ["no amount of memory"]),
        ("80%", ["no amount of memory"]),
        ("\u0661\u0666g", ["no amount of memory"]),
        ("0", ["no memory"]),
        ("0.0GiB", ["no memory"]),
        ("0.9B", ["no memory"]),
        ("9" * 400 + "g", ["too much"]),
        ("24564", ["24564MiB or 23.99GiB"]),
        ("17179869184", ["without a unit", "16GiB"]),
    ],
)
def test_what_is_no_amount_is_refused_with_what_was_expected(text, parts):
    with pytest.raises(ConfigError) as error:
        parse_bytes(text, "--vram")
    assert str(error.value).startswith("--vram is ")
    assert all(part in str(error.value) for part in parts)
    assert len(str(error.value)) < 260


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["plan", "--preset", "tiny"], "--vram"),
        (["plan", "--preset", "tiny"], "--vram-budget"),
        (["plan", "--preset", "tiny"], "--ram"),
        (["plan", "--preset", "tiny", "--gpus", "2"], "--ram_budget"),
        (["plan", "--preset", "tiny", "--gpus", "2"], "--vram"),
    ],
)
@pytest.mark.parametrize("text", ["16 cats", "0", "-1", ""])
def test_plan_refuses_in_one_line(command, option, text):
    result = CliRunner().invoke(main, [*command, "--gpu", "rtx4090", option, text])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    name = "--vram-budget" if option.startswith("--vram") else "--ram-budget"
    assert result.stderr.startswith(f"lowvram: error: {name} is {text!r}")


@pytest.mark.parametrize("option", ["--vram-budget", "--vram", "--ram_budget", "--ram", "--ram-budget"])
@pytest.mark.parametrize("text", ["16 cats", "nan", ""])
def test_infer_refuses_in_one_line(tiny, tmp_path, option, text):
    files = ["--model", tiny.artifact("int8"), "--image", tiny.portrait, "--audio", tiny.voice]
    more = ["--prompt", "A person speaks", "--out", tmp_path / "a.mp4", "--device", "cpu", option, text]
    result = CliRunner().invoke(main, ["infer", *map(str, [*files, *more])])
    assert result.exit_code == 2
    assert f"is {text!r}, which is no amount of memory" in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())
