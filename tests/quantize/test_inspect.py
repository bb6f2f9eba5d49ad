"""What ``inspect`` tells, against the artifact itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open

from lowvram.cli import main
from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.convert import convert
from lowvram_quantize.format import MANIFEST
from lowvram_quantize.inspect import describe, summary
from tests.quantize.checkpoints import clone, refusal, replace, replace_json


@pytest.fixture
def path(tiny) -> Path:
    return tiny.artifact("int8")


@pytest.fixture
def spoiled(path, tmp_path) -> Path:
    return clone(path, tmp_path / "artifact")


def manifest_of(path: Path) -> dict:
    return json.loads((path / MANIFEST).read_text())


def inspect(*args: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, args)])


def test_facts_are_those_of_the_files(path):
    facts, manifest = describe(path), manifest_of(path)
    assert facts["path"] == str(path)
    assert facts["bytes"] == sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    assert facts["format_version"] == manifest["format_version"]
    assert facts["libraries"] == manifest["libraries"]
    assert facts["sources"] == manifest["sources"]
    assert facts["lora"] == manifest["lora"]
    assert facts["verified"] is False
    assert facts["files"] == {name: (path / name).stat().st_size for name in manifest["files"]}
    assert list(facts["components"]) == ["dit", "vae", "text_encoder"]


@pytest.mark.parametrize("name", ["dit", "vae", "text_encoder"])
def test_a_components_facts(path, name):
    facts, entry = describe(path)["components"][name], manifest_of(path)["components"][name]
    tensors = entry["tensors"]
    assert facts["bytes"] == (path / facts["file"]).stat().st_size
    assert facts["config"] == entry["config"]
    assert facts["precision"] == "int8"
    assert facts["tensors"] == sum(facts["schemes"].values()) == len(tensors)
    for scheme, count in facts["schemes"].items():
        assert count == sum(t["scheme"] == scheme for t in tensors.values())
    errors = {n: t["relative_error"] for n, t in tensors.items() if "relative_error" in t}
    assert facts["relative_errors"] == errors
    worst = max(errors, key=lambda n: errors[n])
    assert facts["relative_error"]["worst_tensor"] == worst
    assert facts["relative_error"]["worst"] == errors[worst]
    assert facts["relative_error"]["mean"] == pytest.approx(sum(errors.values()) / len(errors))


def test_a_slabs_facts(path):
    component = describe(path)["components"]["dit"]
    with safe_open(path / "dit.safetensors", "pt") as file:
        names = set(file.keys())
    assert [s["name"] for s in component["slabs"]] == ["start", "shared", "layer.0", "layer.1", "layer.2", "layer.3"]
    for slab in component["slabs"][2:]:
        own = {
            n: e
            for n, e in component["relative_errors"].items()
            if n.startswith(f"blocks.{slab['name'].removeprefix('layer.')}.")
        }
        assert own.keys() <= names
        assert slab["relative_error"]["worst"] >= max(own.values())
    errors = [s["relative_error"]["worst"] for s in component["slabs"] if s["relative_error"]]
    assert max(errors) == component["relative_error"]["worst"]
    header = (path / "dit.safetensors").stat().st_size - sum(s["bytes"] for s in component["slabs"])
    assert header % 4096 == 0


def test_quanto_weights_are_in_their_blocks_error(path):
    slabs = describe(path)["components"]["text_encoder"]["slabs"]
    assert all(slab["relative_error"]["worst"] > 0 for slab in slabs if slab["name"].startswith("block."))


def test_an_artifact_without_errors_or_lora(tiny, tmp_path):
    convert(tiny.checkpoint, tmp_path / "out", precision="bf16", components=("dit",))
    facts = describe(tmp_path / "out")
    assert facts["lora"] is None
    assert facts["components"]["dit"]["relative_error"] is None
    assert all(slab["relative_error"] is None for slab in facts["components"]["dit"]["slabs"])
    assert "no LoRA was merged" in summary(facts)
    assert "weight error" not in summary(facts)


def test_a_summary_names_everything(path):
    facts = describe(path, verify=True)
    text = summary(facts)
    assert facts["verified"] is True
    assert "checksums verified" in text
    assert str(path) in text
    for name, component in facts["components"].items():
        assert f"{name}: int8" in text
        assert component["file"] in text
        assert f"{component['tensors']} tensors" in text
        assert all(f"  {slab['name']}" in text for slab in component["slabs"])
        assert component["relative_error"]["worst_tensor"] in text
    assert all(name in text for name in facts["files"])
    assert all(s["file"] in text and s["sha256"][:16] in text for s in facts["sources"])
    assert f"LoRA liveavatar.safetensors merged: alpha 2, rank 4, {facts['lora']['merged']} layers updated" in text
    assert all(f"{name} {version}" in text for name, version in facts["libraries"].items())


def test_the_command_line_prints_the_summary(path):
    result = inspect(path)
    assert result.exit_code == 0
    assert result.stdout.rstrip("\n") == summary(describe(path))
    assert "not read (--verify reads them)" in result.stdout
    assert "checksums verified" in inspect(path, "--verify").stdout


def test_the_command_line_prints_json(path):
    result = inspect(path, "--json", "--verify")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == describe(path, verify=True)
    assert json.loads(inspect(path, "--json").stdout)["verified"] is False


def refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    last = result.stderr.rstrip("\n").splitlines()[-1]
    assert last.startswith("lowvram: error: ")
    assert all(part in last for part in parts), last


def test_the_command_line_refuses_what_is_damaged(spoiled, tmp_path):
    raw = bytearray((spoiled / "vae.safetensors").read_bytes())
    raw[-1] ^= 1
    replace(spoiled / "vae.safetensors", bytes(raw))
    assert inspect(spoiled).exit_code == 0
    refused(inspect(spoiled, "--verify"), "vae.safetensors", "checksum", "convert")
    replace(spoiled / "vae.safetensors", bytes(raw[:-1]))
    refused(inspect(spoiled), "vae.safetensors", "truncated")
    replace_json(spoiled / MANIFEST, lambda manifest: manifest.update(format_version=7))
    refused(inspect(spoiled, "--json"), "format version 7", "reads 1")
    replace(spoiled / MANIFEST, "{")
    refused(inspect(spoiled), MANIFEST, "JSON")
    refused(inspect(tmp_path / "nowhere"), "nowhere", "is not there")


@pytest.mark.parametrize("name", ["libraries", "sources", "lowvram"])
def test_a_manifest_that_lacks_what_is_told(spoiled, name):
    replace_json(spoiled / MANIFEST, lambda manifest: manifest.pop(name))
    with refusal(CheckpointError, MANIFEST, name, "convert"):
        describe(spoiled)


def test_rotated_groups_are_told(tiny, tmp_path):
    for name, rotate in (("out", None), ("plain", False)):
        convert(tiny.checkpoint, tmp_path / name, components=("dit",), rotate=rotate)
    facts, plain = describe(tmp_path / "out"), describe(tmp_path / "plain")
    wide = sum(name.endswith("ffn.2.weight") for name in facts["components"]["dit"]["relative_errors"])
    others = facts["components"]["dit"]["schemes"]["int8"] - wide
    # The feed-forward's inner width of the tiny model, 216, is no multiple of 16.
    assert facts["components"]["dit"]["rotated_groups"] == {"16": others, "8": wide}
    assert plain["components"]["dit"]["rotated_groups"] == {}
    assert (facts["format_version"], plain["format_version"]) == (4, 1)
    layers = facts["components"]["dit"]["config"]["num_layers"]
    heard = len(facts["components"]["dit"]["config"]["audio_inject_layers"])
    smoothed = 5 * layers + heard  # q, k, v, the cross-attention's q and the first of the FFN; of the injectors q
    assert facts["components"]["dit"]["smoothed"] == smoothed
    assert plain["components"]["dit"]["smoothed"] == 0
    assert f"inputs of {smoothed} weights smoothed, channel by channel" in summary(facts)
    assert "smoothed" not in summary(plain)
    assert f"inputs of {others} weights rotated in groups of 16 channels" in summary(facts)
    assert f"inputs of {wide} weights rotated in groups of 8 channels" in summary(facts)
    assert "weights rotated" not in summary(plain)
