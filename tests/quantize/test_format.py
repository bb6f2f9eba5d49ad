"""The artifact on disk, from the golden checkpoint: what it promises, checked by other means than our own reader."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.convert import convert
from lowvram_quantize.format import MANIFEST, Artifact
from lowvram_quantize.slabs import (
    PAD,
    SLAB_ALIGNMENT,
    TENSOR_ALIGNMENT,
)
from tests.golden_cases import ROOT
from tests.quantize.checkpoints import base_of, clone, refusal, replace, replace_json

CHECKPOINT = ROOT / "pipeline_tiny" / "ckpt"
LORA = CHECKPOINT / "LiveAvatar" / "liveavatar.safetensors"
COMPONENTS = ("dit", "vae", "text_encoder")
WIDE = "blocks.1.ffn.2.weight"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("golden"), set()

    def make(precision: str) -> Path:
        if precision not in made:
            convert(CHECKPOINT, root / precision, precision=precision, lora=LORA, lora_alpha=2.0)
            made.add(precision)
        return root / precision

    return make


@pytest.fixture
def artifact(artifacts, tmp_path) -> Path:
    """An int8 artifact to spoil."""
    return clone(artifacts("int8"), tmp_path / "artifact")


def manifest_of(path: Path) -> dict:
    return json.loads((path / MANIFEST).read_text())


def raw_header(path: Path) -> tuple[dict, int]:
    """As the safetensors format is written down: eight bytes of length, then JSON."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), 8 + length


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("precision", ["int8", "fp8", "bf16", "fp32"])
def test_every_component_is_a_plain_safetensors_file(artifacts, precision):
    for name in COMPONENTS:
        component = Artifact.open(artifacts(precision)).component(name)
        with safe_open(component.path, "pt") as file:
            stored = {n for n in file.keys() if not n.startswith(PAD)}  # noqa: SIM118
            assert stored == set(component.tensor_names)
            assert file.metadata()["component"] == name
            for slab in component.slab_names:
                for tensor_name, view in component.views(slab, component.read_slab(slab)).items():
                    theirs = file.get_tensor(tensor_name)
                    if component.tensor_channels_last(tensor_name):
                        theirs = theirs.movedim(-1, 1)
                    assert view.dtype == theirs.dtype
                    assert view.shape == theirs.shape
                    assert torch.equal(raw(view), raw(theirs))


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_tensors_of_a_slab_tile_one_stretch(artifacts, name):
    facts = manifest_of(artifacts("int8"))["components"][name]
    file = artifacts("int8") / facts["file"]
    header, data_offset = raw_header(file)
    header.pop("__metadata__")
    ranges = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert file.stat().st_size == data_offset + ranges[-1][1]
    # The slabs tile the same stretch, and no tensor lies across two of them.
    edges = [0]
    for slab in facts["slabs"]:
        assert slab["offset"] == edges[-1]
        assert slab["offset"] % SLAB_ALIGNMENT == slab["nbytes"] % SLAB_ALIGNMENT == 0
        edges.append(slab["offset"] + slab["nbytes"])
    assert data_offset % SLAB_ALIGNMENT == 0
    assert edges[-1] == ranges[-1][1]
    assert set(edges) <= {0, *(end for _, end in ranges)}
    for tensor, entry in header.items():
        assert tensor.startswith(PAD) or entry["data_offsets"][0] % TENSOR_ALIGNMENT == 0, tensor


def test_a_layers_slab_holds_that_layer_alone(artifacts):
    component = Artifact.open(artifacts("int8")).component("dit")
    layers = component.config["num_layers"]
    assert component.slab_names == ["start", "shared", *(f"layer.{i}" for i in range(layers))]
    for i in range(layers):
        names = [spec.name for spec in component.slab_specs(f"layer.{i}")]
        prefixes = [f"blocks.{i}."]
        if i in (injected := component.config["audio_inject_layers"]):
            number = injected.index(i)
            prefixes += [f"audio_injector.{part}.{number}." for part in ("injector", "injector_adain_layers")]
        assert {next((p for p in prefixes if name.startswith(p)), name) for name in names} == set(prefixes)
    assert not [s.name for s in component.slab_specs("shared") if s.name.startswith("blocks.")]


def test_a_slab_is_read_to_a_buffer_in_one_piece(artifacts):
    component = Artifact.open(artifacts("int8")).component("dit")
    buffer = torch.full((component.slab_nbytes("layer.1") + 100,), 7, dtype=torch.uint8)
    filled = component.read_slab("layer.1", buffer)
    assert filled.data_ptr() == buffer.data_ptr()
    assert torch.equal(filled, component.read_slab("layer.1"))
    assert (buffer[-100:] == 7).all()
    views = component.views("layer.1", buffer)
    weight = views["blocks.1.self_attn.q.weight"]
    assert weight.dtype == torch.int8
    assert buffer.data_ptr() <= weight.data_ptr() < buffer.data_ptr() + len(buffer)
    with refusal(CheckpointError, "no slab layer.99", "shared"):
        component.read_slab("layer.99")


def test_the_manifest_says_what_was_made_from_what(artifacts):
    manifest = manifest_of(artifacts("int8"))
    assert manifest["format"] == "lowvram-artifact"
    assert manifest["format_version"] == 5
    assert manifest["lowvram"] == version("lowvram")
    for library in ("torch", "diffusers", "transformers", "safetensors", "optimum-quanto", "bitsandbytes"):
        assert manifest["libraries"][library] == version(library)
    base = base_of(CHECKPOINT)
    sources = {os.path.normpath(base / source["file"]): source for source in manifest["sources"]}
    expected = [*base.glob("*.safetensors"), *base.glob("*.pth"), LORA]
    assert set(sources) == {str(path) for path in expected}
    for path in expected:
        assert sources[str(path)]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert sources[str(path)]["bytes"] == path.stat().st_size
    lora = manifest["lora"]
    assert lora["sha256"] == hashlib.sha256(LORA.read_bytes()).hexdigest()
    assert (lora["file"], lora["alpha"], lora["ranks"]) == ("liveavatar.safetensors", 2.0, [4])
    assert lora["merged"] > 0


def test_the_manifest_has_every_tensors_scheme_and_error(artifacts):
    for precision in ("int8", "fp8"):
        for name, facts in manifest_of(artifacts(precision))["components"].items():
            component = Artifact.open(artifacts(precision)).component(name)
            models = {n.removesuffix("._data") for n in component.tensor_names if not n.endswith("_scale")}
            assert set(facts["tensors"]) == models
            for tensor, fact in facts["tensors"].items():
                quantized = fact["scheme"] not in ("bf16", "fp32")
                assert ("relative_error" in fact) == quantized, tensor
                assert not quantized or 0 < fact["relative_error"] < (0.02 if precision == "int8" else 0.06), tensor
            assert component.quantized_names == [n for n, f in facts["tensors"].items() if "relative_error" in f]


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_checksums_are_those_of_the_bytes(artifacts, precision):
    manifest = manifest_of(artifacts(precision))
    for facts in manifest["components"].values():
        raw = (artifacts(precision) / facts["file"]).read_bytes()
        _, data_offset = raw_header(artifacts(precision) / facts["file"])
        assert facts["header_sha256"] == hashlib.sha256(raw[:data_offset]).hexdigest()
        for slab in facts["slabs"]:
            begin = data_offset + slab["offset"]
            assert slab["sha256"] == hashlib.sha256(raw[begin : begin + slab["nbytes"]]).hexdigest()
    for name, facts in manifest["files"].items():
        raw = (artifacts(precision) / name).read_bytes()
        assert (facts["bytes"], facts["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest())


@pytest.mark.parametrize("name", ["dit", "vae"])
def test_eight_bits_take_at_most_0_6_of_bf16(artifacts, name):
    size = {p: (artifacts(p) / f"{name}.safetensors").stat().st_size for p in ("int8", "fp8", "bf16")}
    assert size["int8"] <= 0.6 * size["bf16"]
    assert size["fp8"] <= 0.6 * size["bf16"]


def test_nothing_but_what_the_manifest_lists(artifacts):
    manifest = manifest_of(artifacts("int8"))
    listed = {MANIFEST, *manifest["files"], *(facts["file"] for facts in manifest["components"].values())}
    files = {p.relative_to(artifacts("int8")).as_posix() for p in artifacts("int8").rglob("*") if p.is_file()}
    assert files == listed


def test_an_artifact_as_it_was_written_opens(artifacts):
    for precision in ("int8", "fp8", "bf16", "fp32"):
        artifact = Artifact.open(artifacts(precision), verify=True)
        assert artifact.precisions() == dict.fromkeys(COMPONENTS, precision)
    with refusal(CheckpointError, "no unet", "dit, vae, text_encoder"):
        artifact.component("unet")


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    replace(path, bytes(raw))


@pytest.mark.parametrize("name", ["dit.safetensors", "vae.safetensors", "text_encoder.safetensors"])
def test_one_changed_byte_in_a_component(artifact, name):
    clean = (artifact / name).read_bytes()
    _, data_offset = raw_header(artifact / name)
    # The first and the last byte of the data, one in a scale, one in padding: all belong to some slab.
    for place in (data_offset, len(clean) - 1, (data_offset + len(clean)) // 2, data_offset + 4095):
        flip(artifact / name, place)
        Artifact.open(artifact)  # not read without being asked to
        with refusal(CheckpointError, name, "slab", "checksum", "convert"):
            Artifact.open(artifact, verify=True)
        replace(artifact / name, clean)
    replace(artifact / name, clean.replace(b'"component":"', b'"Component":"', 1))
    with refusal(CheckpointError, name, "header", "checksum", "convert"):
        Artifact.open(artifact, verify=True)


@pytest.mark.parametrize(
    "name", ["audio_encoder/model.safetensors", "audio_encoder/config.json", "tokenizer/tokenizer.json"]
)
def test_one_changed_byte_in_a_copied_file(artifact, name):
    flip(artifact / name, (artifact / name).stat().st_size // 2)
    with refusal(CheckpointError, name, "changed", "convert"):
        Artifact.open(artifact, verify=True)


@pytest.mark.parametrize("name", ["dit.safetensors", "vae.safetensors", "tokenizer/tokenizer.json"])
def test_missing_and_truncated_files(artifact, name):
    clean = (artifact / name).read_bytes()
    for data in (clean[:-1], clean[: len(clean) // 2], clean + b"\0", b"", None):
        replace(artifact / name, data)
        with refusal(CheckpointError, name, "convert" if data is not None else ""):
            Artifact.open(artifact)


@pytest.mark.parametrize("found", [0, 6, 99, "1", None, True, 2.0])
def test_another_format_version(artifact, found):
    replace_json(artifact / MANIFEST, lambda manifest: manifest.update(format_version=found))
    with refusal(CheckpointError, MANIFEST, f"format version {found!r}", "reads 1 to 5", "convert again"):
        Artifact.open(artifact)


@pytest.mark.parametrize(
    ("name", "group"),
    [(WIDE, 0), (WIDE, 1), (WIDE, "16"), (WIDE, True), (WIDE, None), (WIDE, 512), ("head.head.weight", 16)],
)
def test_a_rotation_that_cannot_be(artifact, name, group):
    def change(manifest):
        manifest["components"]["dit"]["tensors"][name]["rotated_group"] = group

    replace_json(artifact / MANIFEST, change)
    with refusal(CheckpointError, MANIFEST, name, f"groups of {group!r}", "convert again"):
        Artifact.open(artifact)


@pytest.mark.parametrize(
    ("version", "group", "known"),
    [
        *((1, 1, True), (1, 8, False), (2, 8, True), (2, 16, True), (2, 64, False)),
        *((3, 16, True), (3, 64, True), (3, 256, True), (3, 512, False)),
    ],
)
def test_how_many_channels_were_rotated_together_in_which_version(artifact, version, group, known):
    def change(manifest):
        for component in manifest["components"].values():
            for facts in component["tensors"].values():
                for key in ("rotated_group", "smoothed", "channels_last"):
                    facts.pop(key, None)
        manifest["components"]["dit"]["tensors"][WIDE] |= {"rotated_group": group} if group > 1 else {}
        manifest["format_version"] = version

    replace_json(artifact / MANIFEST, change)
    if not known:
        with refusal(CheckpointError, MANIFEST, WIDE, f"groups of {group}", "format version" if version == 1 else "to"):
            Artifact.open(artifact)
        return
    dit = Artifact.open(artifact).component("dit")
    assert dit.tensor_group(WIDE) == group
    assert {dit.tensor_group(name) for name in dit.tensor_names if name != WIDE} == {1}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (WIDE, False, "true, in int8"),
        (WIDE, 1, "true, in int8"),
        (WIDE, None, "true, in int8"),
        ("head.head.weight", True, "bf16.*true, in int8"),
        ("frame_packer.proj_2x.weight", True, "int8_weight_only.*true, in int8"),
    ],
)
def test_a_smoothing_that_cannot_be(artifact, name, value, said):
    def change(manifest):
        manifest["components"]["dit"]["tensors"][name]["smoothed"] = value

    replace_json(artifact / MANIFEST, change)
    with pytest.raises(CheckpointError, match=f"{name} .*{said}.*convert again"):
        Artifact.open(artifact)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_no_smoothing_in_versions_that_did_not_have_it(artifact, version):
    def change(manifest):
        manifest["format_version"] = version
        if version == 1:
            for facts in manifest["components"]["dit"]["tensors"].values():
                facts.pop("rotated_group", None)

    replace_json(artifact / MANIFEST, change)
    with refusal(CheckpointError, MANIFEST, "smoothed", "none in its format version", "convert again"):
        Artifact.open(artifact)


def test_another_format(artifact):
    replace_json(artifact / MANIFEST, lambda manifest: manifest.update(format="other"))
    with refusal(CheckpointError, MANIFEST, "lowvram-artifact"):
        Artifact.open(artifact)


@pytest.mark.parametrize("text", ["{", "", "[]", "null", b"\xff\xfe", "not json", '"lowvram-artifact"', "[" * 5000])
def test_a_manifest_that_is_none(artifact, text):
    replace(artifact / MANIFEST, text)
    with refusal(CheckpointError, MANIFEST, "convert"):
        Artifact.open(artifact)


def parts(value, path=()):
    """Paths of a manifest's parts: of many of one kind the first."""
    if path:
        yield path
    if isinstance(value, dict | list) and path[-1:] != ("config",):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys[:1] if path[-1:] in (("tensors",), ("slabs",), ("sources",), ("files",)) else keys:
            yield from parts(value[key], (*path, key))


def opens(path: Path) -> bool:
    """Whether it opens; any other error than ours passes."""
    try:
        Artifact.open(path, verify=True)
    except CheckpointError:
        return False
    return True


def test_a_manifest_with_a_damaged_part_is_refused_or_read(artifact):
    clean = (artifact / MANIFEST).read_text()
    opened = {}
    for path in parts(json.loads(clean)):
        for bad in (None, -1, "x", [], {"x": 1}):
            damaged = json.loads(clean)
            inner = damaged
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = bad
            replace(artifact / MANIFEST, json.dumps(damaged))
            opened[path, str(bad)] = opens(artifact)
    # What nothing is read by may hold anything of its type; the rest is refused.
    assert sum(opened.values()) < len(opened) / 4
    assert not any(opened[(key, "None")] for key in [("components",), ("files",), ("components", "dit", "slabs")])
    replace(artifact / MANIFEST, clean)
    assert opens(artifact)


def test_a_folder_without_a_manifest(artifact, tmp_path):
    replace(artifact / MANIFEST, None)
    with refusal(CheckpointError, "no artifact", MANIFEST, "lowvram convert"):
        Artifact.open(artifact)
    with refusal(CheckpointError, "nowhere", "is not there"):
        Artifact.open(tmp_path / "nowhere")


def test_an_artifact_may_lie_anywhere(artifacts, tmp_path, monkeypatch):
    shutil.copytree(artifacts("int8"), tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert Artifact.open("moved", verify=True).precisions()["dit"] == "int8"
