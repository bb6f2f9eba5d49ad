"""Mixed artifacts by several ranks: the latents that one process makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowvram_quantize.convert import convert
from lowvram_quantize.presets import TINY
from tests.golden_cases import relative_error
from tests.lowvram.mixes import apart
from tests.lowvram.parallel.conftest import Made, Maker, layout_options


@pytest.fixture(scope="module")
def mixed(maker: Maker) -> Path:
    """Layers of four kinds, each of another length."""
    maker.artifact()  # which writes the checkpoint
    layers = apart(TINY.dit, "every layer otherwise")
    return convert(maker.root / "ckpt", maker.root / "mixed", precision="int8", vae="fp32", apart=layers)


@pytest.fixture(scope="module")
def alone(maker: Maker, mixed: Path, tmp_path_factory) -> Made:
    return maker.make(tmp_path_factory.mktemp("alone"), 0, model=mixed, num_clip=1)


@pytest.mark.parametrize(
    ("stages", "ulysses", "options", "most"),
    [(2, 1, ["--offload-model"], 0.0), (1, 2, ["--offload-model"], 0.01)],
    ids=["stages", "ulysses"],
)
def test_ranks_make_the_same_of_it(maker, mixed, alone, tmp_path, stages, ulysses, options, most):
    options = [*layout_options(stages, ulysses, False), *options]
    made = maker.make(tmp_path, stages * ulysses, *options, model=mixed, num_clip=1)
    errors = [relative_error(a, b) for a, b in zip(made.latents, alone.latents, strict=True)]
    assert max(errors) <= most, errors
