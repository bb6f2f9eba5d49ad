"""Weights of the VAE's convolutions lie channels-last in an artifact; those of older ones are turned as they load."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from lowvram.loading.encoders import load_vae
from lowvram.loading.weights import turned
from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.convert import convert
from lowvram_quantize.format import MANIFEST, Artifact
from lowvram_quantize.inspect import describe, summary
from lowvram_quantize.slabs import read_header, sha256_range
from tests.quantize.checkpoints import clone, refusal, replace_json, run

CPU = torch.device("cpu")
FILE = "vae.safetensors"
CONV = "decoder.conv_in.weight"
EVERY = pytest.mark.parametrize("precision", ["int8", "fp8", "bf16", "fp32"])
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def older(artifact: Path, folder: Path) -> Path:
    """The same artifact as format version 4 had it: the VAE's weights in PyTorch's own order."""
    old = clone(artifact, folder)
    component = Artifact.open(artifact).component("vae")
    header, start = read_header(artifact / FILE)
    raw = bytearray((artifact / FILE).read_bytes())
    for slab in component.slab_names:
        for name, view in component.views(slab, component.read_slab(slab)).items():
            begin, end = header[name]["data_offsets"]
            raw[start + begin : start + end] = view.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            header[name]["shape"] = list(view.shape)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(start - 8)
    raw[8:start] = text
    (old / FILE).unlink()
    (old / FILE).write_bytes(raw)

    def change(manifest):
        manifest["format_version"] = 4
        facts = manifest["components"]["vae"]
        facts["header_sha256"] = sha256_range(old / FILE, 0, start)
        for slab in facts["slabs"]:
            slab["sha256"] = sha256_range(old / FILE, start + slab["offset"], slab["nbytes"])
        for tensor in facts["tensors"].values():
            tensor.pop("channels_last", None)

    replace_json(old / MANIFEST, change)
    return old


@EVERY
def test_convolutions_lie_as_they_are_computed_with(tiny, precision):
    component = Artifact.open(tiny.artifact(precision)).component("vae")
    views = component.views("shared", component.read_slab("shared"))
    turned_names = {name for name in views if component.tensor_channels_last(name)}
    assert turned_names == {n for n, view in views.items() if view.ndim > 3 and n.endswith(".weight")}
    assert len(turned_names) > 60
    for name in turned_names:
        assert views[name].is_contiguous(memory_format=LAST[views[name].ndim]), name
        spec = next(spec for spec in component.slab_specs("shared") if spec.name == name)
        assert spec.shape == views[name].shape
        assert spec.stored_shape == views[name].movedim(1, -1).shape
    raw, _ = read_header(component.path)  # the file says of its bytes what they are
    assert raw[CONV]["shape"] == list(views[CONV].movedim(1, -1).shape)


@EVERY
def test_an_older_artifact_gives_the_same_vae(tiny, tmp_path, precision):
    artifact = tiny.artifact(precision)
    old = Artifact.open(older(artifact, tmp_path / "old"), verify=True)
    ours, theirs = (load_vae(a, CPU, torch.float32).vae for a in (Artifact.open(artifact), old))
    mine, others = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == others.keys()
    for name, weight in mine.items():
        assert torch.equal(weight.float(), others[name].float()), name
        assert weight.stride() == others[name].stride(), name


def test_only_a_vae_needs_the_version(tiny, tmp_path):
    versions = {}
    for part in ("dit", "vae", "text_encoder"):
        run(tiny.checkpoint, tmp_path / part, components=(part,))
        versions[part] = Artifact.open(tmp_path / part).manifest["format_version"]
    assert versions == {"dit": 4, "vae": 5, "text_encoder": 1}


def test_inspect_says_so_and_nothing_of_an_older_artifact(tiny, tmp_path):
    new = describe(tiny.artifact("int8"))
    old = describe(older(tiny.artifact("int8"), tmp_path / "old"))
    assert [facts["components"]["vae"]["channels_last"] > 60 for facts in (new, old)] == [True, False]
    assert new["components"]["dit"]["channels_last"] == 0
    said = [f"weights of {new['components']['vae']['channels_last']} convolutions channels-last" in summary(f)
            for f in (new, old)]  # fmt: skip
    assert said == [True, False]


@pytest.mark.parametrize(
    ("component", "name", "value", "version", "said"),
    [
        ("vae", CONV, False, 5, "expected true"),
        ("vae", CONV, 1, 5, "expected true"),
        ("vae", CONV, "yes", 5, "expected true"),
        ("vae", CONV, None, 5, "expected true"),
        ("vae", CONV, True, 4, "none in its format version"),
        ("vae", "decoder.conv_in.bias", True, 5, "of 1 dimensions"),
        ("dit", "head.head.weight", True, 5, "of 2 dimensions"),
    ],
)
def test_an_order_that_cannot_be(tiny, tmp_path, component, name, value, version, said):
    artifact = clone(tiny.artifact("int8"), tmp_path / "artifact")

    def change(manifest):
        manifest["format_version"] = version
        manifest["components"][component]["tensors"][name]["channels_last"] = value

    replace_json(artifact / MANIFEST, change)
    with refusal(CheckpointError, name if version == 5 else "channels_last", said, "convert again"):
        Artifact.open(artifact)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(6, 4, 3, 3, 3), (6, 4, 3, 1, 1), (5, 3, 1, 1, 1), (6, 4, 3, 3), (7, 5, 1, 1)])
def test_a_weight_is_turned_in_its_own_memory_where_that_may_be_written_to(dtype, shape):
    values = torch.randint(-9, 9, shape).to(dtype)
    for owned in (True, False):
        weight = values.clone()
        found = turned(weight, owned=owned)
        assert torch.equal(found.float(), values.float())
        assert found.is_contiguous(memory_format=LAST[len(shape)])
        flat = values.is_contiguous(memory_format=LAST[len(shape)])  # of one pixel, both orders are the same
        assert (found.data_ptr() == weight.data_ptr()) == (owned or flat)
        assert owned or torch.equal(weight.float(), values.float())


def test_what_an_older_version_began_is_begun_anew_and_said(tiny, out, caplog, monkeypatch):
    """A VAE that was half done in the other order: none of its bytes are taken."""

    def stop(_done: int, _total: int, what: str) -> None:
        if what.startswith("text_encoder"):
            raise KeyboardInterrupt

    parts = ("vae", "text_encoder")
    with monkeypatch.context() as before:
        before.setattr("lowvram_quantize.components.is_convolution", lambda name, shape: False)
        with pytest.raises(KeyboardInterrupt):
            run(tiny.checkpoint, out, components=parts, progress=stop)
    with caplog.at_level(logging.WARNING):
        run(tiny.checkpoint, out, components=parts)
    assert "vae.safetensors was begun from other files, with other options or by a lowvram that lays it" in caplog.text
    component = Artifact.open(out, verify=True).component("vae")
    assert component.tensor_channels_last(CONV)


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_an_artifacts_vae_is_no_source(tiny, tmp_path, precision):
    file = tiny.artifact(precision) / FILE
    with refusal(CheckpointError, FILE, "the VAE of a lowvram artifact", "the checkpoint that it was made from"):
        convert(None, tmp_path / "out", vae_file=file, components=("vae",))
