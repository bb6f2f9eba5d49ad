from __future__ import annotations

import json

import pytest
import torch

from lowvram_kernels.errors import ConfigError
from lowvram_kernels.linear import linear_w8a8
from lowvram_kernels.rotation import rotated
from lowvram_kernels.rows import quantize_rows
from lowvram_quantize.convert import convert
from lowvram_quantize.format import MANIFEST, SMOOTH_SCALE, Artifact, Component
from lowvram_quantize.schemes import Scheme, dit_scheme, with_rotation, with_smoothing
from lowvram_quantize.smoothing import smooth_factors


def test_factors_are_powers_of_two_by_the_root_of_the_columns_norms():
    norms = torch.tensor([1.0, 1.0, 1.0, 4.0, 0.25, 64.0, 1 / 256])
    assert smooth_factors(norms).tolist() == [1, 1, 1, 2, 0.5, 8, 1 / 16]


def test_factors_from_activations_too():
    norms, rms = torch.ones(5), torch.tensor([1.0, 1.0, 1.0, 16.0, 1 / 64])
    assert smooth_factors(norms, rms).tolist() == [1, 1, 1, 0.25, 8]
    assert smooth_factors(torch.tensor([1.0, 1.0, 1.0, 16.0, 1 / 64]), rms).tolist() == [1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("weights", "activations", "factors"),
    [
        ([1.0, 1.0, 0.0], None, [1, 1, 2**-5]),  # a column of zeros
        ([0.0, 0.0, 0.0], None, [1, 1, 1]),
        ([0.0, 0.0, 1.0], None, [1, 1, 1]),  # more than half of them
        ([1.0, 1.0, 1e30], None, [1, 1, 2**5]),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1, 1, 2**5]),  # a dead channel
        ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1, 1, 1]),
        ([1.0, 1.0, 0.0], [1.0, 1.0, 1e30], [1, 1, 2**-10]),
    ],
)
def test_factors_stay_within_bounds(weights, activations, factors):
    rms = None if activations is None else torch.tensor(activations)
    assert smooth_factors(torch.tensor(weights), rms).tolist() == factors


def test_what_is_smoothed():
    def smoothed(name: str, precision: str = "int8", **options: bool) -> bool:
        return with_smoothing(with_rotation(dit_scheme(name, precision), (8, 64)), name, **options).smooth

    behind = [
        f"blocks.3.{name}.weight" for name in ("self_attn.q", "self_attn.k", "self_attn.v", "cross_attn.q", "ffn.0")
    ]
    behind.append("audio_injector.injector.11.q.weight")
    alone = [f"blocks.3.{name}.weight" for name in ("self_attn.o", "cross_attn.o", "ffn.2")]
    alone.append("audio_injector.injector.11.o.weight")
    never = ["blocks.3.cross_attn.k.weight", "blocks.3.cross_attn.v.weight", "audio_injector.injector.1.k.weight"]
    never += ["audio_injector.injector_adain_layers.0.linear.weight", "head.head.weight", "frame_packer.proj_2x.weight"]
    assert [name for name in (*behind, *alone, *never) if smoothed(name)] == behind
    assert [name for name in (*behind, *alone, *never) if smoothed(name, measured=True)] == [*behind, *alone]
    for precision in ("fp8", "bf16", "fp32"):
        assert not any(smoothed(name, precision, measured=True) for name in (*behind, *alone, *never))
    assert Scheme("int8", "rows", torch.int8).smooth is False


def stored(dit: Component, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a layer, by their last name."""
    for slab in dit.slab_names:
        views = dit.views(slab, dit.read_slab(slab))
        if f"{name}.weight" in views:
            return {key.removeprefix(f"{name}."): value for key, value in views.items() if key.startswith(f"{name}.")}
    raise KeyError(name)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smooth")
    options = {"components": ("dit",), "lora": tiny.lora, "lora_alpha": 2.0}
    exact = Artifact.open(convert(tiny.checkpoint, folder / "fp32", precision="fp32", **options)).component("dit")
    return exact, Artifact.open(convert(tiny.checkpoint, folder / "int8", **options)).component("dit")


@pytest.mark.parametrize("name", ["blocks.0.self_attn.k", "blocks.1.cross_attn.q", "blocks.2.ffn.0"])
def test_weights_times_their_factors_are_the_weights(made, name):
    exact, dit = (stored(component, name) for component in made)
    group = made[1].tensor_group(f"{name}.weight")
    back = rotated(dit["weight"].float() * dit["weight_scale"][:, None], group) * dit[SMOOTH_SCALE].float()
    assert made[1].tensor_smoothed(f"{name}.weight")
    assert ((back - exact["weight"]).norm() / exact["weight"].norm()).item() < 0.012
    mantissas, _ = torch.frexp(dit[SMOOTH_SCALE].float())
    assert set(mantissas.tolist()) == {0.5}


def test_queries_keys_and_values_have_the_same_factors(made):
    q, k, v = (stored(made[1], f"blocks.1.self_attn.{name}")[SMOOTH_SCALE] for name in "qkv")
    assert torch.equal(q, k)
    assert torch.equal(q, v)


@pytest.mark.parametrize(
    ("options", "smoothed"),
    [
        ({}, True),
        ({"rotate": False}, False),
        ({"smooth": False}, False),
        ({"rotate": False, "smooth": True}, True),
        ({"precision": "fp8"}, False),
        ({"precision": "bf16"}, False),
    ],
)
def test_when_inputs_are_smoothed(tiny, tmp_path, options, smoothed):
    artifact = convert(tiny.checkpoint, tmp_path / "out", components=("dit",), **options)
    assert (json.loads((artifact / MANIFEST).read_text())["format_version"] == 4) == smoothed
    dit = Artifact.open(artifact).component("dit")
    assert any(name.endswith(SMOOTH_SCALE) for name in dit.tensor_names) == smoothed


@pytest.mark.parametrize("options", [{"dit": "fp8"}, {"precision": "bf16"}, {"components": ("vae",)}])
def test_with_nothing_to_smooth_it_is_refused(tiny, tmp_path, options):
    with pytest.raises(ConfigError, match="--smooth was given"):
        convert(tiny.checkpoint, tmp_path / "out", smooth=True, **options)


@pytest.mark.parametrize("large", [16.0, 64.0, 256.0])
def test_outliers_that_small_weights_make_up_for_cost_little(large):
    """What smoothing is for: without it the error grows with the outliers."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 512), torch.randn(128, 512)
    x[:, 7::100] *= large
    weight[:, 7::100] /= large
    exact = x.double() @ weight.double().t()
    errors = []
    for factors in (torch.ones(512), smooth_factors(weight.norm(dim=0))):
        q, scale = quantize_rows(weight / factors, torch.int8, group=256)
        out = linear_w8a8(x, q, scale[:, 0], None, group=256, smooth_K=factors)
        errors.append(((out - exact).norm() / exact.norm()).item())
    assert errors[1] < {16.0: 0.7, 64.0: 0.3, 256.0: 0.2}[large] * errors[0]
