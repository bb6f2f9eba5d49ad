"""Artifacts with rotated groups: what their latents are worth, and that nothing computes without the rotation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowvram.loading.weights import build_dit
from lowvram.pipeline import AvatarPipeline
from lowvram.recorder import TensorRecorder
from lowvram_kernels.errors import CheckpointError
from lowvram_kernels.modules import QuantizedLinear
from lowvram_quantize.convert import convert
from lowvram_quantize.format import CHANNELS_LAST_VERSION, MANIFEST, Artifact
from lowvram_quantize.synthetic import write_checkpoint
from tests.quantize.checkpoints import base_of, change_dit, clone, replace_json

LAYERS = 4
KINDS = {"fp32": {"dit": "fp32"}, "int8": {"rotate": False}, "rotated": {"smooth": False}}


def artifacts(checkpoint: Path, folder: Path) -> dict[str, Path]:
    """The DiT in three ways; all else as it was trained, so that the DiT's error is the only one."""
    rest = {"vae": "fp32", "text_encoder": "fp32"}
    return {kind: convert(checkpoint, folder / kind, **rest, **options) for kind, options in KINDS.items()}


def latents(artifact: Path, request) -> torch.Tensor:
    recorder = TensorRecorder()
    for _ in AvatarPipeline.from_artifact(artifact, device="cpu").stream(request, recorder=recorder):
        pass
    blocks = [value for name, value in recorder.tensors().items() if name.startswith("latents.block")]
    return torch.cat([block.flatten() for block in blocks]).double()


def errors(made: dict[str, Path], request) -> tuple[float, float]:
    """Relative errors of the latents against float32: plain int8's and the rotated one's."""
    found = {kind: latents(path, request) for kind, path in made.items()}
    exact = found.pop("fp32")
    plain, turned = (((value - exact).norm() / exact.norm()).item() for value in found.values())
    return plain, turned


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> dict[str, Path]:
    return artifacts(tiny.checkpoint, tmp_path_factory.mktemp("made"))


def test_latents_are_about_as_good_as_those_of_plain_int8(tiny, made):
    plain, turned = errors(made, tiny.request(num_clip=1))
    assert 1e-4 < turned < 1.1 * plain < 0.03


def test_latents_are_better_where_channels_stand_out(tiny, tmp_path):
    """Two channels in front of the text's queries are enlarged, and the queries' weights made smaller in proportion."""
    checkpoint = clone(tiny.checkpoint, tmp_path / "ckpt")
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        for name, factor in (("norm3.weight", 200), ("norm3.bias", 200), ("cross_attn.q.weight", 1 / 200)):
            change_dit(base_of(checkpoint), f"{block}.{name}", lambda t, f=factor: scaled(t, f))
    plain, turned = errors(artifacts(checkpoint, tmp_path), tiny.request(num_clip=1))
    assert turned < 0.75 * plain


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    tensor[..., [3, 40]] *= factor
    return tensor


def test_the_layers_know_their_groups(made):
    dit = build_dit(Artifact.open(made["rotated"]).component("dit"))
    groups = {n: m.group for n, m in dit.named_modules() if isinstance(m, QuantizedLinear)}
    assert set(groups.values()) == {8, 16}
    assert all((group == 8) == name.endswith("ffn.2") for name, group in groups.items())
    plain = build_dit(Artifact.open(made["int8"]).component("dit"))
    assert {m.group for m in plain.modules() if isinstance(m, QuantizedLinear)} == {1}


def test_the_same_names_and_bytes_but_other_values(made):
    manifests = [json.loads((made[kind] / MANIFEST).read_text()) for kind in ("int8", "rotated")]
    slabs = [
        [{k: v for k, v in slab.items() if k != "sha256"} for slab in manifest["components"]["dit"]["slabs"]]
        for manifest in manifests
    ]
    assert slabs[0] == slabs[1]
    # Both have a VAE, whose convolutions lie channels-last.
    assert [manifest["format_version"] for manifest in manifests] == [CHANNELS_LAST_VERSION] * 2


@pytest.mark.parametrize("group", [12, 32, 256])
def test_groups_that_a_layer_cannot_have_are_refused(made, tmp_path, group):
    path = clone(made["rotated"], tmp_path / "artifact")
    name = "blocks.0.ffn.0"

    def change(manifest):
        manifest["components"]["dit"]["tensors"][f"{name}.weight"]["rotated_group"] = group

    replace_json(path / MANIFEST, change)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be used: groups of {group} .* divides 80"):
        build_dit(Artifact.open(path).component("dit"))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A checkpoint of one layer whose widths the groups 64 and 128 divide."""
    sizes = {"dim": 320, "ffn_dim": 384, "num_heads": 5, "num_layers": 1, "audio_inject_layers": (0,), "shards": 1}
    return write_checkpoint(tmp_path_factory.mktemp("small"), **sizes)


@pytest.mark.parametrize(
    ("rotate", "version", "groups"),
    [(False, 1, {1}), (16, 2, {16}), (32, 3, {32}), (64, 3, {64}), (None, 3, {64, 128})],
)
def test_groups_of_every_size_from_convert_to_latents(tiny, small, small_exact, tmp_path, rotate, version, groups):
    options = {"rotate": rotate, "smooth": False}
    artifact = convert(small, tmp_path / "rotated", vae="fp32", text_encoder="fp32", **options)
    alone = convert(small, tmp_path / "alone", components=("dit",), **options)
    found = [json.loads((path / MANIFEST).read_text())["format_version"] for path in (alone, artifact)]
    assert found == [version, CHANNELS_LAST_VERSION]
    dit = build_dit(Artifact.open(artifact).component("dit"))
    assert {m.group for m in dit.modules() if isinstance(m, QuantizedLinear)} == groups
    found = latents(artifact, tiny.request(num_clip=1, sample_steps=1))
    assert 1e-4 < ((found - small_exact).norm() / small_exact.norm()).item() < 0.03


@pytest.fixture(scope="module")
def small_exact(tiny, small, tmp_path_factory) -> torch.Tensor:
    """Latents of the same in float32."""
    folder = tmp_path_factory.mktemp("exact") / "fp32"
    return latents(convert(small, folder, precision="fp32"), tiny.request(num_clip=1, sample_steps=1))
