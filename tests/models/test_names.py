"""The name tables against the published names: every one covered, once, with the published shape."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from lowvram_models.config import DiTConfig
from lowvram_models.dit import CausalDiT
from lowvram_models.names import SHARED, START, dit_slab, umt5_name, umt5_slab, vae_names
from lowvram_models.text_encoder import build_umt5
from lowvram_models.vae import build_vae

GOLDEN = Path(__file__).parents[1] / "golden"


def manifest(name: str) -> dict[str, list[int]]:
    return json.loads((GOLDEN / f"{name}_manifest.json").read_text())


def parameters(model: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def dit_config() -> DiTConfig:
    return DiTConfig.from_dict(json.loads((GOLDEN / "dit_14b_config.json").read_text()))


def test_the_published_dit_has_our_names_and_shapes(dit_config):
    with torch.device("meta"):
        model = CausalDiT(dit_config)
    assert parameters(model) == manifest("dit_14b")
    assert not dict(model.named_buffers())


def test_the_published_text_encoder_fills_the_librarys_model():
    published = manifest("t5")
    with torch.device("meta"):
        model = build_umt5(vocab_size=256384, d_model=4096, d_ff=10240, num_heads=64, num_layers=24)
    renamed = {umt5_name(name): shape for name, shape in published.items()}
    assert None not in renamed
    assert len(renamed) == len(published)
    assert renamed == parameters(model)


def test_the_published_vae_fills_the_librarys_model():
    published = manifest("vae")
    names = vae_names(published)
    assert set(names) == set(published)
    assert len(set(names.values())) == len(published)
    with torch.device("meta"):
        model = build_vae(96)
    assert {names[name]: shape for name, shape in published.items()} == parameters(model)


@pytest.mark.parametrize(
    "name", ["blocks.0.attn.q.bias", "blocks.x.attn.q.weight", "blocks.0", "head.weight", "", "xblocks.0.norm1.weight"]
)
def test_names_that_the_text_encoder_does_not_have(name):
    assert umt5_name(name) is None


def test_unknown_names_of_the_vae_come_through():
    names = vae_names(["encoder.conv1.weight", "optimizer.step"])
    assert names == {"encoder.conv1.weight": "encoder.conv_in.weight", "optimizer.step": "optimizer.step"}


def test_every_layer_of_the_dit_is_a_slab_with_its_injection(dit_config):
    injected = dit_config.audio_inject_layers
    slabs = {name: dit_slab(name, injected) for name in manifest("dit_14b")}
    assert set(slabs.values()) == {START, SHARED} | {f"layer.{i}" for i in range(dit_config.num_layers)}
    for name, slab in slabs.items():
        if name.startswith("blocks."):
            assert slab == f"layer.{name.split('.')[1]}"
        elif name.startswith("audio_injector."):
            assert slab == f"layer.{injected[int(name.split('.')[2])]}"
        else:
            assert slab == (START if name.startswith(("time_", "text_")) else SHARED)
    # All layers are alike but for the injection, so there are two sizes of slab.
    sizes = Counter(slabs.values())
    assert {sizes[f"layer.{i}"] for i in injected}.isdisjoint(
        {sizes[f"layer.{i}"] for i in range(dit_config.num_layers) if i not in injected}
    )
    assert len({sizes[f"layer.{i}"] for i in injected}) == 1


def test_an_injection_without_a_layer_is_shared():
    assert dit_slab("audio_injector.injector.2.q.weight", (0, 4)) == SHARED
    assert dit_slab("audio_injector.injector.1.q.weight", (0, 4)) == "layer.4"


def test_every_block_of_the_text_encoder_is_a_slab():
    slabs = {umt5_slab(umt5_name(name)) for name in manifest("t5")}
    assert slabs == {SHARED} | {f"block.{i}" for i in range(24)}
    assert umt5_slab("shared.weight") == umt5_slab("encoder.final_layer_norm.weight") == SHARED
