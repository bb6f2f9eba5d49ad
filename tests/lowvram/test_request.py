"""What is read for a request: the part of the voice, the size of the video, and what is said of both."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lowvram.cli import main
from lowvram.commands.shared_options import seconds_of
from lowvram.media.samples import draw_portrait, synth_voice, write_wav
from lowvram.media.sizes import output_size
from lowvram.request import Request, read_inputs
from lowvram_kernels.errors import ConfigError

TIMES = [
    ("90", 90), ("90.5", 90.5), (".5", 0.5), ("2s", 2), ("0", 0), ("1:30", 90), ("01:05.25", 65.25), ("75:00", 4500),
    ("1:02:03.5", 3723.5), (" 7 ", 7),
]  # fmt: skip


@pytest.mark.parametrize(("text", "seconds"), TIMES)
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text, "--audio-start") == seconds


@pytest.mark.parametrize(
    "text", ["", "a", "-1", "1:60", "1:-5", "1.5:00", "1:60:00", "1:2:3:4", "1,5", "nan", "1e3", ":30", "٣"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--audio-start is .*expected seconds"):
        seconds_of(text, "--audio-start")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_track": 0}, "--audio-track is 0; expected 1"),
        ({"audio_track": -1}, "expected 1, the first"),
        ({"audio_start": -0.5}, "--audio-start is -0.5 s"),
        ({"audio_start": float("inf")}, "--audio-start is inf s"),
        ({"audio_duration": 0.0}, "--audio-duration is 0 s; expected more"),
        ({"audio_duration": float("nan")}, "--audio-duration is nan s"),
    ],
)
def test_parts_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Request(image=Path("a"), audio=Path("b"), prompt="", **change)


# size, the portrait's height and width, the video's as the reference makes it, and scaled up
SIZES = [
    ("704*384", 64, 64, (64, 64), (512, 512)), ("704*384", 100, 150, (128, 192), (384, 576)),
    ("1280*720", 384, 384, (384, 384), (960, 960)), ("832*480", 300, 200, (320, 256), (768, 512)),
    ("384*256", 500, 500, (256, 256), (256, 256)), ("704*384", 380, 700, (384, 704), (384, 704)),
    ("384*256", 202, 404, (192, 448), (192, 448)),
]  # fmt: skip


@pytest.mark.parametrize(("size", "height", "width", "plain", "scaled"), SIZES)
def test_small_portraits_are_said_and_scaled_up_on_request(
    tmp_path: Path, size: str, height: int, width: int, plain: tuple, scaled: tuple, caplog: pytest.LogCaptureFixture
) -> None:
    draw_portrait(height, width).save(tmp_path / "a.png")
    write_wav(tmp_path / "a.wav", synth_voice(0.6), 16000)
    files = {"image": tmp_path / "a.png", "audio": tmp_path / "a.wav", "prompt": ""}
    with caplog.at_level(logging.WARNING):
        made = read_inputs(Request(**files, size=size)).portrait.shape[1:]
    assert tuple(made) == plain == output_size(size, height, width)
    assert ("--upscale makes it " + f"{scaled[1]}x{scaled[0]}" in caplog.text) == (plain != scaled)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        made = read_inputs(Request(**files, size=size, upscale=True)).portrait.shape[1:]
    assert tuple(made) == scaled == output_size(size, height, width, upscale=True)
    assert "--upscale" not in caplog.text


@pytest.mark.parametrize("size", ["128*128", "384*256", "704*384", "1280*720", "1920*1088"])
def test_scaling_up_keeps_to_the_area(size: str) -> None:
    area = int(np.prod([int(side) for side in size.split("*")]))
    for height, width in np.random.default_rng(0).integers(32, 2000, (300, 2)).tolist():
        plain, scaled = (np.prod(output_size(size, height, width, upscale=upscale)) for upscale in (False, True))
        assert plain <= scaled <= area
        assert height * width <= area or plain == scaled


def test_scaling_up_is_the_rule_for_large_portraits() -> None:
    for size, height, width, _, scaled in SIZES[:4]:
        assert scaled == output_size(size, 10 * height, 10 * width)


@pytest.fixture
def infer(tiny, tmp_path):
    def run(*options: str):
        write_wav(tmp_path / "voice.wav", np.r_[np.zeros(8000, np.float32), synth_voice(2.0)], 16000)
        files = {"model": tiny.artifact("fp32"), "image": tiny.portrait, "audio": tmp_path / "voice.wav"}
        files |= {"out": tmp_path / "a.mp4", "prompt": "x", "size": "128*128"}
        files |= {"infer_frames": 12, "sample_steps": 1, "device": "cpu"}
        words = [f"--{name}={value}" for name, value in files.items()]
        return CliRunner().invoke(main, ["infer", "-q", "--overwrite", *words, *options])

    return run


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--audio-start", "9"], "--audio-start is 9 s"),
        (["--audio-start", "1", "--audio-duration", "0.2"], "expected at least 0.4800 s"),
        (["--audio-duration", "0.5"], "is silent"),
        (["--audio-track", "2"], "has 1 sound track; expected 1 to 1"),
        (["--audio-start", "soon"], "expected seconds, as 90"),
    ],
)
def test_parts_that_are_not_there_are_one_line(infer, tmp_path, options: list[str], words: str) -> None:
    done = infer(*options)
    assert done.exit_code == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("lowvram: error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert not (tmp_path / "a.mp4").exists()
