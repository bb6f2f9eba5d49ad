"""Mixed precision by budget, from ``convert`` to the manifest: bytes, errors, refusals, interruptions, reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import lowvram_quantize.mixed as module
from lowvram.cli import main
from lowvram_kernels.errors import ConfigError
from lowvram_quantize.convert import convert
from lowvram_quantize.format import MANIFEST, Artifact
from lowvram_quantize.inspect import describe, summary
from lowvram_quantize.sensitivity import SENSITIVITY, role_of
from lowvram_quantize.source import TensorRef
from lowvram_quantize.units import SCHEMES, unit_of
from tests.quantize.checkpoints import Stop, contents, refusal, run, stop_at

DIT = ("dit",)


def dit_only(checkpoint: Path, out: Path, **options: object) -> Path:
    return run(checkpoint, out, components=DIT, **options)


def nbytes(artifact: Path) -> int:
    return (artifact / "dit.safetensors").stat().st_size


@pytest.fixture(scope="module")
def uniform(tiny, tmp_path_factory) -> dict[str, int]:
    """Bytes of the DiT's file in int8 and in bf16."""
    folder = tmp_path_factory.mktemp("uniform")
    return {each: nbytes(dit_only(tiny.checkpoint, folder / each, dit=each)) for each in ("int8", "bf16")}


def between(uniform: dict[str, int], share: float) -> int:
    return round(uniform["int8"] + share * (uniform["bf16"] - uniform["int8"]))


@pytest.mark.parametrize("share", [0, 0.03, 0.1, 0.25, 0.5, 0.77, 0.95, 1])
def test_the_file_takes_what_was_asked_but_for_1_percent(tiny, uniform, tmp_path, share):
    target = between(uniform, share)
    artifact = dit_only(tiny.checkpoint, tmp_path / "auto", precision="auto", target_bytes=target)
    assert 0.99 * target <= nbytes(artifact) <= target
    Artifact.open(artifact, verify=True)


def test_all_bytes_are_uniform_bf16_s_own(tiny, uniform, tmp_path):
    auto = dit_only(tiny.checkpoint, tmp_path / "auto", precision="auto", target_bytes=uniform["bf16"])
    bf16 = dit_only(tiny.checkpoint, tmp_path / "bf16", precision="bf16")
    assert contents(auto)["dit.safetensors"] == contents(bf16)["dit.safetensors"]


def test_more_bytes_are_predicted_to_err_less_than_int8(tiny, uniform, tmp_path):
    found = []
    for share in (0, 0.2, 0.4, 0.8):
        out = dit_only(tiny.checkpoint, tmp_path / f"{share}", precision="auto", target_bytes=between(uniform, share))
        found.append(describe(out)["components"]["dit"]["choice"]["predicted_error"])
    assert all(error < found[0] for error in found[1:])
    assert min(found) < found[0] / 2


@pytest.mark.parametrize(("share", "words"), [(-0.01, "are int8"), (1.01, "are bf16")])
def test_bytes_out_of_reach_are_refused_before_anything_is_measured(tiny, uniform, tmp_path, monkeypatch, share, words):
    monkeypatch.setattr(module, "weight_errors", None)
    target = between(uniform, share)
    with refusal(ConfigError, f"--target-bytes is {target}", str(uniform["int8"]), str(uniform["bf16"]), words):
        dit_only(tiny.checkpoint, tmp_path / "auto", precision="auto", target_bytes=target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.4, 0.6, 0.95])
def test_an_error_is_kept_within_for_the_fewest_bytes(tiny, uniform, tmp_path, share):
    lowest = dit_only(tiny.checkpoint, tmp_path / "int8", precision="auto", target_bytes=uniform["int8"])
    most = share * describe(lowest)["components"]["dit"]["choice"]["predicted_error"]
    artifact = dit_only(tiny.checkpoint, tmp_path / "auto", dit="auto", max_error=most)
    choice = describe(artifact)["components"]["dit"]["choice"]
    assert choice["predicted_error"] <= most
    # With a little less, nothing within the error is found.
    less = int(nbytes(artifact) * 0.985)
    if less > uniform["int8"]:
        other = dit_only(tiny.checkpoint, tmp_path / "less", precision="auto", target_bytes=less)
        assert describe(other)["components"]["dit"]["choice"]["predicted_error"] > most


def test_an_error_out_of_reach(tiny, tmp_path):
    with refusal(ConfigError, "--max-error is 1e-07, but the least that is predicted is", "bytes"):
        dit_only(tiny.checkpoint, tmp_path / "auto", precision="auto", max_error=1e-7)


OPTIONS = [
    ({"precision": "auto"}, "expected one of both"),
    ({"dit": "auto"}, "expected one of both"),
    ({"precision": "auto", "target_bytes": 10**6, "max_error": 0.1}, "expected one of both"),
    ({"precision": "int8", "target_bytes": 10**6}, "for a DiT in int8"),
    ({"precision": "auto", "dit": "bf16", "max_error": 0.1}, "for a DiT in bf16"),
    ({"precision": "int8", "vae": "auto"}, "precision of vae is 'auto'"),
    ({"precision": "auto", "max_error": 0.1, "apart": {"blocks.0.ffn.0.weight": "bf16"}}, "apart"),
]


@pytest.mark.parametrize(("options", "part"), OPTIONS)
def test_options_that_contradict_each_other(tiny, tmp_path, options, part):
    with refusal(ConfigError, part):
        convert(tiny.checkpoint, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("apart", "part"),
    [
        ({"blocks.0.ffn.9.weight": "bf16"}, "blocks.0.ffn.9.weight is to be stored in bf16"),
        ({"blocks.0.norm3.weight": "int8"}, "blocks.0.norm3.weight is to be stored in int8"),
        ({"blocks.0.ffn.0.weight": "nf4"}, "stored in nf4"),
        ({"blocks.0.self_attn.q.weight": "bf16"}, "blocks.0.self_attn.qkv would have"),
        ({"blocks.0.cross_attn.v.weight": "fp8"}, "blocks.0.cross_attn.kv would have"),
        ({"audio_injector.injector.0.k.weight": "fp8"}, "audio_injector.injector.0.kv would have"),
    ],
)
def test_mixes_by_hand_that_cannot_be(tiny, tmp_path, apart, part):
    with refusal(ConfigError, part):
        dit_only(tiny.checkpoint, tmp_path / "out", precision="int8", apart=apart)


def test_only_the_dit_is_mixed(tiny, uniform, tmp_path):
    target = between(uniform, 0.3)
    artifact = Artifact.open(convert(tiny.checkpoint, tmp_path / "auto", precision="auto", target_bytes=target))
    assert artifact.precisions() == {"dit": "mixed", "vae": "int8", "text_encoder": "int8"}
    facts = artifact.component("dit").facts
    for name, tensor in facts["tensors"].items():
        if (unit := unit_of(name)) in facts["choice"]["units"]:
            assert tensor["scheme"].removesuffix("_weight_only") == facts["choice"]["units"][unit]["scheme"]
    assert {role_of(unit) for unit in facts["choice"]["units"]} == set(SENSITIVITY)
    assert all(set(of["error_parts"]) == set(SCHEMES) for of in facts["choice"]["units"].values())
    assert f"chosen within {target} bytes" in summary(describe(artifact.path))


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Names of the weights that were measured, in order."""
    real, names = module.weight_errors, []

    def weight_errors(item, *args):
        names.append(item.name)
        return real(item, *args)

    monkeypatch.setattr(module, "weight_errors", weight_errors)
    return names


@pytest.mark.parametrize("count", [1, 30, 64, 120])
def test_an_interrupted_run_goes_on(tiny, uniform, tmp_path, measured, count):
    options = {"precision": "auto", "target_bytes": between(uniform, 0.4)}
    whole = contents(dit_only(tiny.checkpoint, tmp_path / "whole", **options))
    every = len(measured)
    measured.clear()
    with pytest.raises(Stop):
        dit_only(tiny.checkpoint, tmp_path / "out", progress=stop_at(count), **options)
    assert len(measured) == min(count, every)
    assert contents(dit_only(tiny.checkpoint, tmp_path / "out", **options)) == whole
    assert len(measured) == every
    assert not list(tmp_path.glob("*.partial"))


def test_what_was_measured_serves_another_budget_and_no_other_checkpoint(tiny, uniform, tmp_path, measured):
    options = {"precision": "auto", "target_bytes": between(uniform, 0.4)}
    with pytest.raises(Stop):
        dit_only(tiny.checkpoint, tmp_path / "out", progress=stop_at(20), **options)
    journal = tmp_path / "out.partial" / module.JOURNAL
    with journal.open("a") as file:
        file.write('["cut sho')
    dit_only(tiny.checkpoint, tmp_path / "out", precision="auto", max_error=0.01)
    assert len(measured) == len(set(measured))
    measured.clear()
    with pytest.raises(Stop):
        dit_only(tiny.checkpoint, tmp_path / "other", progress=stop_at(20), **options)
    dit_only(tiny.checkpoint, tmp_path / "other", lora_alpha=3.0, **options)
    assert len(measured) > len(set(measured)) + 15


def test_the_source_is_read_twice_at_most(tiny, uniform, tmp_path, monkeypatch):
    real, read = TensorRef.read_rows, []

    def read_rows(self, start, count):
        read.append(count * self.nbytes // self.rows)
        return real(self, start, count)

    monkeypatch.setattr(TensorRef, "read_rows", read_rows)
    dit_only(tiny.checkpoint, tmp_path / "int8", precision="int8", lora=None, lora_alpha=None)
    once = sum(read)
    read.clear()
    options = {"precision": "auto", "lora": None, "lora_alpha": None}
    dit_only(tiny.checkpoint, tmp_path / "auto", target_bytes=between(uniform, 0.4), **options)
    assert once < sum(read) <= 2 * once


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--target-bytes", "1GB"], 2, "--target-bytes is 1000000000, but the DiT's file takes"),
        (["--target-bytes", "much"], 2, "--target-bytes is 'much'"),
        (["--max-error", "0"], 2, "--max-error is 0.0"),
        ([], 2, "--target-bytes, as 17GB, or within --max-error, as 0.02"),
        (["--max-error", "0.004"], 0, ""),
    ],
)
def test_the_command_line(tiny, tmp_path, arguments, code, part):
    command = ["convert", "--ckpt-dir", str(tiny.checkpoint), "--out", str(tmp_path / "out"), "--precision", "auto"]
    result = CliRunner().invoke(main, [*command, "--json", *arguments])
    assert result.exit_code == code, result.output
    if code:
        assert part in result.stderr
    else:
        facts = json.loads(result.stdout)
        assert facts["components"]["dit"]["precision"] == "mixed"
        assert facts["components"]["dit"]["choice"]["max_error"] == 0.004
        assert (tmp_path / "out" / MANIFEST).is_file()
