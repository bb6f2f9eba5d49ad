"""Mixed artifacts: the same latents wherever their layers lie, by however many ranks; and what cannot be mixed."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from lowvram.loading.weights import build_dit
from lowvram.offload.copy_engine import Engine
from lowvram_kernels.errors import CheckpointError
from lowvram_quantize import shape_artifact
from lowvram_quantize.format import MANIFEST, Artifact
from lowvram_quantize.inspect import describe, summary
from lowvram_quantize.presets import TINY
from lowvram_quantize.shape_artifact import RandomFill, write_shape_artifact
from tests.lowvram.mixes import MIXES, apart
from tests.lowvram.streams.test_placements import LAYERS, PLACEMENTS, latents
from tests.quantize.checkpoints import clone, replace_json

FEW = dataclasses.replace(TINY, dit=TINY.dit | {"num_layers": LAYERS, "audio_inject_layers": [0]})
UNEQUAL = ["the first layer in bf16", "every layer otherwise"]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Mix -> an artifact."""
    folder, fill = tmp_path_factory.mktemp("mixed"), RandomFill()

    def artifact(mix: str) -> Artifact:
        path = folder / mix.replace(" ", "-")
        if not path.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(shape_artifact.PRESETS, "tiny", FEW)
                write_shape_artifact(path, preset="tiny", fill=fill, apart=apart(FEW.dit, mix))
        return Artifact.open(path)

    return artifact


@pytest.mark.parametrize(("mix", "kv"), list(itertools.product(UNEQUAL, ("plain", "int8"))))
def test_latents_are_the_same_wherever_layers_lie(artifacts, mix, kv):
    artifact = artifacts(mix)
    component = artifact.component("dit")
    sizes = {component.slab_nbytes(f"layer.{index}") for index in range(LAYERS)}
    assert len(sizes) == LAYERS  # the slots are as large as the largest
    resident, *others = (
        latents(artifact, dataclasses.replace(placement, kv=kv), Engine(torch.device("cpu")))
        for placement in PLACEMENTS.values()
    )
    assert all(torch.equal(resident, other) for other in others)


@pytest.mark.parametrize("mix", MIXES)
def test_every_layer_is_what_the_manifest_says(artifacts, mix):
    component = artifacts(mix).component("dit")
    dit, wanted = build_dit(component), apart(FEW.dit, mix)
    assert component.precision == "mixed"
    stored = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
    for name in (name for name in component.tensor_names if name.endswith("weight")):
        scheme = component.tensor_scheme(name)
        expected = stored.get(scheme.removesuffix("_weight_only"), torch.float32)
        assert dit.get_parameter(name).dtype is expected, name
        if name in wanted:
            assert scheme in (wanted[name], "bf16"), name


@pytest.mark.parametrize("kinds", [("bf16", "int8", "int8"), ("int8", "fp8", "int8"), ("fp8", "fp8", "bf16")])
def test_queries_keys_and_values_of_one_input_are_stored_alike(artifacts, tmp_path, kinds):
    names = [f"blocks.1.self_attn.{name}.weight" for name in "qkv"]
    path = tmp_path / "unlike"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shape_artifact.PRESETS, "tiny", FEW)
        write_shape_artifact(path, preset="tiny", apart=dict(zip(names, kinds, strict=True)))
    said = ", ".join(kind.replace("bf16", "plain") for kind in kinds)
    with pytest.raises(CheckpointError, match=f"share their input, are stored in {said}; expected the same"):
        build_dit(Artifact.open(path).component("dit"))


def test_a_scheme_that_is_not_the_tensor_s_own_is_refused(artifacts, tmp_path):
    """A manifest that says int8 of what is stored in bf16, and the other way round."""
    for tensor, scheme in (("blocks.1.ffn.0.weight", "int8"), ("blocks.0.ffn.0.weight", "bf16")):
        path = clone(artifacts("every layer otherwise").path, tmp_path / scheme)
        change = {"scheme": scheme}
        replace_json(path / MANIFEST, lambda m, t=tensor, c=change: m["components"]["dit"]["tensors"].update({t: c}))
        with pytest.raises(CheckpointError, match="convert"):
            latents(Artifact.open(path), PLACEMENTS["resident"], Engine(torch.device("cpu")))


def test_inspect_counts_what_it_is_made_of(artifacts):
    facts = describe(artifacts("every layer otherwise").path)
    schemes = facts["components"]["dit"]["schemes"]
    assert {"int8", "fp8", "bf16", "int8_weight_only"} == set(schemes)
    assert "dit: mixed" in summary(facts)
