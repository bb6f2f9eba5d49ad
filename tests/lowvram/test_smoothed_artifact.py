"""Artifacts whose Linears' inputs are smoothed: what their latents are worth, and that none computes without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowvram.loading.weights import build_dit, check_complete
from lowvram_kernels.errors import CheckpointError
from lowvram_kernels.modules import QuantizedLinear
from lowvram_quantize.convert import convert
from lowvram_quantize.format import MANIFEST, Artifact
from tests.lowvram.test_rotated_artifact import LAYERS, latents, scaled
from tests.quantize.checkpoints import base_of, change_dit, clone, replace_json

KINDS = {"fp32": {"dit": "fp32"}, "rotated": {"smooth": False}, "smoothed": {}}


def made_of(checkpoint: Path, folder: Path) -> dict[str, Path]:
    rest = {"vae": "fp32", "text_encoder": "fp32"}
    return {kind: convert(checkpoint, folder / kind, **rest, **options) for kind, options in KINDS.items()}


def errors(made: dict[str, Path], request) -> dict[str, float]:
    """Relative errors of the latents against float32."""
    found = {kind: latents(path, request) for kind, path in made.items()}
    exact = found.pop("fp32")
    return {kind: ((value - exact).norm() / exact.norm()).item() for kind, value in found.items()}


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> dict[str, Path]:
    return made_of(tiny.checkpoint, tmp_path_factory.mktemp("made"))


def test_latents_are_about_as_good_as_without(tiny, made):
    found = errors(made, tiny.request(num_clip=1))
    assert 1e-4 < found["smoothed"] < 1.1 * found["rotated"] < 0.03


def test_latents_are_better_where_small_weights_make_up_for_outliers(tiny, tmp_path):
    """Two channels behind the middle norm are enlarged, and the weights that read them made smaller in proportion."""
    checkpoint = clone(tiny.checkpoint, tmp_path / "ckpt")
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        for name, factor in (("norm3.weight", 200), ("norm3.bias", 200), ("cross_attn.q.weight", 1 / 200)):
            change_dit(base_of(checkpoint), f"{block}.{name}", lambda t, f=factor: scaled(t, f))
    found = errors(made_of(checkpoint, tmp_path), tiny.request(num_clip=1))
    assert found["smoothed"] < 0.8 * found["rotated"]


def test_the_layers_have_their_factors(made):
    dit = build_dit(Artifact.open(made["smoothed"]).component("dit"))
    smoothed = {n for n, m in dit.named_modules() if isinstance(m, QuantizedLinear) and m.smooth_scale is not None}
    assert {name.rpartition("blocks.")[2].partition(".")[2] for name in smoothed if name.startswith("blocks")} == {
        "self_attn.q",
        "self_attn.k",
        "self_attn.v",
        "cross_attn.q",
        "ffn.0",
    }
    assert {name for name in smoothed if not name.startswith("blocks")} == {
        "audio_injector.injector.0.q",
        "audio_injector.injector.1.q",
    }


@pytest.mark.parametrize("name", ["blocks.1.cross_attn.q", "blocks.0.ffn.0"])
def test_a_manifest_that_keeps_factors_quiet_is_refused(made, tmp_path, name):
    path = clone(made["smoothed"], tmp_path / "artifact")
    replace_json(path / MANIFEST, lambda m: m["components"]["dit"]["tensors"][f"{name}.weight"].pop("smoothed"))
    component = Artifact.open(path).component("dit")
    with pytest.raises(CheckpointError, match=rf"{name}.smooth_scale.*convert the checkpoint again"):
        check_complete(build_dit(component), component)


@pytest.mark.parametrize("name", ["blocks.1.cross_attn.o", "blocks.0.ffn.2", "blocks.2.cross_attn.k"])
def test_a_manifest_that_promises_factors_is_refused(made, tmp_path, name):
    path = clone(made["smoothed"], tmp_path / "artifact")
    replace_json(path / MANIFEST, lambda m: m["components"]["dit"]["tensors"][f"{name}.weight"].update(smoothed=True))
    component = Artifact.open(path).component("dit")
    with pytest.raises(CheckpointError, match=rf"{name}.smooth_scale.*convert the checkpoint again"):
        check_complete(build_dit(component), component)


def test_factors_are_counted_among_the_bytes(made):
    layer, plain = (
        Artifact.open(made[kind]).component("dit").slab_specs("layer.1") for kind in ("smoothed", "rotated")
    )
    extra = {spec.name: spec.nbytes for spec in layer if spec.name not in {other.name for other in plain}}
    assert sum(extra.values()) == 5 * 80 * torch.bfloat16.itemsize
