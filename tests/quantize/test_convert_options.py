"""Options of ``convert``: unknown ones, and rotations."""

from __future__ import annotations

import pytest

from lowvram_kernels.errors import ConfigError
from tests.quantize.test_convert import command, one_line, refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "int4"}, "'int4'"),
        ({"vae": "nf4"}, "precision of vae is 'nf4'"),
        ({"dit": "nf4"}, "precision of dit is 'nf4'"),
        ({"text_encoder": "q4"}, "'q4'"),
        ({"components": ("unet",)}, "unet"),
        ({"components": ()}, "[]"),
    ],
)
def test_options_that_are_not_known(tiny, out, options, said):
    refused(tiny.checkpoint, out, said, "expected", kind=ConfigError, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "fp8"}, "whose DiT is fp8"),
        ({"dit": "bf16"}, "whose DiT is bf16"),
        ({"components": ("vae", "tokenizer")}, "without a DiT"),
    ],
)
def test_a_rotation_with_nothing_to_rotate(tiny, out, options, said):
    refused(tiny.checkpoint, out, "--rotate", said, "leave it out", kind=ConfigError, rotate=True, **options)
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize(
    ("given", "rotate"),
    [
        ((), None),
        (("--rotate",), 256),
        (("--rotate", "none"), False),
        (("--rotate=16",), 16),
        (("--rotate", "64"), 64),
        (("--rotate", "--dit", "int8"), 256),
    ],
)
def test_a_rotation_on_the_command_line(tiny, out, monkeypatch, given, rotate):
    asked: list[object] = []
    monkeypatch.setattr(
        "lowvram_quantize.convert.convert", lambda *_, **options: asked.append(options["rotate"]) or out
    )
    assert command(tiny.checkpoint, out, *given).exit_code == 0
    (given_on,) = asked
    assert (type(given_on), given_on) == (type(rotate), rotate)


def test_what_cannot_be_rotated_on_the_command_line(tiny, tmp_path):
    one_line(command(tiny.checkpoint, tmp_path / "twelve", "--rotate", "12"), 2, "--rotate", "'12'", "none")
    one_line(command(tiny.checkpoint, tmp_path / "fp8", "--rotate", "--dit", "fp8"), 2, "--rotate", "whose DiT is fp8")
