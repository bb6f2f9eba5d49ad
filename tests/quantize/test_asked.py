"""What is asked of ``convert`` for an artifact that is there already."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowvram_kernels.errors import ConfigError
from lowvram_quantize.asked import Asked
from lowvram_quantize.convert import convert
from lowvram_quantize.format import Artifact
from lowvram_quantize.original import original_of

ERROR = 0.05


@pytest.fixture(scope="module")
def chosen(tiny, tmp_path_factory) -> Artifact:
    out = tmp_path_factory.mktemp("chosen") / "out"
    return Artifact.open(convert(tiny.checkpoint, out, precision="auto", max_error=ERROR, components=("dit",)))


@pytest.mark.parametrize("options", [{}, {"max_error": ERROR}, {"smooth": True}, {"rotate": True}])
def test_what_it_was_made_with_may_be_said_again(chosen, options):
    Asked(precision="auto", **options).check(chosen)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_error": 0.04}, "made with --max-error 0.05, and 0.04 was given"),
        ({"target_bytes": 10**6}, "made with --target-bytes none, and 1000000 was given"),
        ({"measure_on": Path("bf16")}, "made without --measure-on"),
        ({"precision": "int8"}, "a dit in mixed, and int8 was asked for"),
        ({"activations": Path("int8")}, "made without --activations"),
    ],
)
def test_other_budgets_are_refused(chosen, options, said):
    with pytest.raises(ConfigError, match=rf"{said}.*anew with --overwrite"):
        Asked(**{"precision": "auto", **options}).check(chosen)


@pytest.mark.parametrize("options", [{"target_bytes": 10**6}, {"max_error": 0.1}, {"measure_on": Path("bf16")}])
def test_a_budget_for_what_was_made_without_one_is_refused(tiny, options):
    with pytest.raises(ConfigError, match="anew with --overwrite"):
        Asked(**options).check(Artifact.open(tiny.artifact("int8")))


@pytest.mark.parametrize("rotate", [None, False, 16])
def test_weights_are_prepared_as_convert_would(tiny, rotate):
    original = original_of(tiny.checkpoint, lora=tiny.lora, lora_alpha=2.0, rotate=rotate)
    group, factors = original.int8("blocks.0.self_attn.k.weight")
    assert group == (1 if rotate is False else 16)
    assert (factors is None) == (rotate is False)
    assert original.int8("blocks.0.ffn.2.weight")[1] is None
