"""Artifacts without a checkpoint: published shapes that take no disk, and random values that a pipeline can run on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lowvram.loading.weights import build_dit, check_complete
from lowvram.pipeline import AvatarPipeline
from lowvram_kernels.errors import CheckpointError, ConfigError, InputError
from lowvram_models.audio_encoder import build_wav2vec2, wav2vec2_state
from lowvram_quantize.convert import convert
from lowvram_quantize.format import Artifact
from lowvram_quantize.inspect import describe, summary
from lowvram_quantize.shape_artifact import RandomFill, write_shape_artifact
from lowvram_quantize.slabs import PAD
from lowvram_quantize.source import open_safetensors

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Artifact:
    return Artifact.open(write_shape_artifact(tmp_path_factory.mktemp("shapes") / "14b"))


def stored_shapes(artifact: Artifact, component: str) -> dict[str, tuple[int, ...]]:
    found = artifact.component(component)
    return {spec.name: spec.shape for slab in found.slab_names for spec in found.slab_specs(slab)}


def test_the_dit_has_the_published_names_shapes_and_configuration(published):
    manifest = {n: tuple(s) for n, s in json.loads((GOLDEN / "dit_14b_manifest.json").read_text()).items()}
    stored = stored_shapes(published, "dit")
    assert {name: shape for name, shape in stored.items() if not name.endswith("_scale")} == manifest
    assert sum(map(math.prod, manifest.values())) == pytest.approx(16.30e9, rel=1e-3)
    golden = json.loads((GOLDEN / "dit_14b_config.json").read_text())
    config = published.component("dit").config
    assert {name: config[name] for name in golden} == golden


def test_the_encoders_have_the_published_shapes(published):
    text = json.loads((GOLDEN / "t5_manifest.json").read_text())
    vae = json.loads((GOLDEN / "vae_manifest.json").read_text())
    for component, manifest in (("text_encoder", text), ("vae", vae)):
        stored = {n: s for n, s in stored_shapes(published, component).items() if not n.endswith("_scale")}
        assert sorted(map(math.prod, stored.values())) == sorted(map(math.prod, manifest.values()))


def test_the_audio_encoder_loads_strictly_by_name_and_shape(published):
    folder = published.path / "audio_encoder"
    table = open_safetensors(folder / "model.safetensors")
    with torch.device("meta"):
        model = build_wav2vec2(json.loads((folder / "config.json").read_text()))
        state = wav2vec2_state({name: torch.empty(ref.shape) for name, ref in table.items()})
    model.load_state_dict(state, assign=True, strict=True)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (24, 1024)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(315e6, rel=0.01)
    assert not any(name.startswith(PAD) for name in table)


def test_the_runtime_finds_the_model_it_expects(published):
    component = published.component("dit")
    check_complete(build_dit(component), component)


def test_its_linears_are_smoothed_and_rotated_as_convert_does(published):
    tensors = published.component("dit").facts["tensors"].values()
    assert published.manifest["format_version"] == 5
    assert {facts["rotated_group"] for facts in tensors if "rotated_group" in facts} == {256}
    assert sum("smoothed" in facts for facts in tensors) == 40 * 5 + 12


def test_files_without_values_take_no_disk(published):
    files = [file.stat() for file in published.path.rglob("*") if file.is_file()]
    assert sum(s.st_size for s in files) > 24e9
    assert sum(s.st_blocks * 512 for s in files) < 4e6


def test_nothing_is_said_to_be_verified(published):
    with pytest.raises(CheckpointError, match=r"is a shape artifact \(no values\).*no checksums"):
        Artifact.open(published.path, verify=True)
    assert "shape artifact of preset 14b: no values" in summary(describe(published.path))


@pytest.mark.parametrize(("precision", "text_encoder"), [("int8", None), ("fp8", "nf4"), ("bf16", None)])
def test_it_is_laid_out_as_a_converted_checkpoint_is(wide, tmp_path, precision, text_encoder):
    made = convert(wide.checkpoint, tmp_path / "converted", precision=precision, text_encoder=text_encoder)
    shapes = write_shape_artifact(tmp_path / "shapes", precision=precision, text_encoder=text_encoder, preset="tiny")
    converted, shapes = (Artifact.open(path) for path in (made, shapes))
    for name in ("dit", "vae"):
        assert shapes.component(name).facts["slabs"] == [
            slab | {"sha256": ""} for slab in converted.component(name).facts["slabs"]
        ]
    assert shapes.precisions() == converted.precisions()
    assert shapes.manifest["files"].keys() == converted.manifest["files"].keys()


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_a_pipeline_runs_on_random_values(tiny, tmp_path, precision):
    path = write_shape_artifact(tmp_path / "random", precision=precision, preset="tiny", fill=RandomFill())
    pipeline = AvatarPipeline.from_artifact(path, device="cpu")
    (frames,) = list(pipeline.stream(tiny.request(num_clip=1, infer_frames=12)))
    assert frames.shape == (9, 128, 128, 3)
    assert frames.std() > 5
    assert ((frames > 0) & (frames < 255)).mean() > 0.01


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_random_weights_spread_as_their_fan_in_wants(tmp_path, precision):
    component = Artifact.open(
        write_shape_artifact(tmp_path / "random", precision=precision, preset="tiny", fill=RandomFill())
    ).component("dit")
    views = component.views("layer.1", component.read_slab("layer.1"))
    for name in ("blocks.1.ffn.0", "blocks.1.self_attn.q"):
        weight = views[f"{name}.weight"].float() * views[f"{name}.weight_scale"][:, None]
        assert weight.std() * math.sqrt(weight.shape[1]) == pytest.approx(1, rel=0.05)
    assert views["blocks.1.norm3.weight"].float().mean() == pytest.approx(1, abs=0.05)


def test_values_come_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("lowvram_quantize.shape_artifact.PIECE_BYTES", 1024)
    fill = RandomFill()
    asked = []

    def watched(item, spec, begin, nbytes):
        asked.append(nbytes)
        return fill(item, spec, begin, nbytes)

    pieces = write_shape_artifact(tmp_path / "pieces", preset="tiny", fill=watched)
    monkeypatch.undo()
    whole = write_shape_artifact(tmp_path / "whole", preset="tiny", fill=fill)
    assert max(asked) == 1024
    for file in ("dit", "vae", "text_encoder", "audio_encoder/model"):
        names = [path / f"{file}.safetensors" for path in (pieces, whole)]
        assert names[0].read_bytes() == names[1].read_bytes()


def test_a_fill_of_the_wrong_length_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="fill gave 1 bytes"):
        write_shape_artifact(tmp_path / "wrong", preset="tiny", fill=lambda *_: torch.zeros(1, dtype=torch.uint8))


def test_what_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="preset is '7b'"):
        write_shape_artifact(tmp_path / "a", preset="7b")
    with pytest.raises(ConfigError, match="precision is 'nf4'"):
        write_shape_artifact(tmp_path / "a", precision="nf4", preset="tiny")
    with pytest.raises(InputError, match="does not exist"):
        write_shape_artifact(tmp_path / "no" / "a", preset="tiny")
    write_shape_artifact(tmp_path / "a", preset="tiny")
    with pytest.raises(ConfigError, match="finished artifact"):
        write_shape_artifact(tmp_path / "a", preset="tiny")
