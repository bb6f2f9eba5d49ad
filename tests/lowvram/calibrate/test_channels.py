"""What a calibration measured, as the next ``convert`` takes it with ``--activations``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

from lowvram.calibrate.activations import Sampler, Watched
from lowvram.cli import main
from lowvram.loading.weights import build_dit, check_complete
from lowvram_kernels.errors import CheckpointError, ConfigError, InputError
from lowvram_quantize.activations import Measured
from lowvram_quantize.convert import convert
from lowvram_quantize.format import MANIFEST, Artifact
from lowvram_quantize.inspect import describe, summary
from lowvram_quantize.original import original_of
from tests.lowvram.test_rotated_artifact import latents
from tests.quantize.checkpoints import base_of, change_dit, clone, contents, replace_json

LARGE = [1, 77, 150]  # of the feed-forward's inner channels


def test_the_root_mean_square_of_every_channel():
    watched, sampler = Watched(), Sampler()
    first, second = torch.randn(5, 3), torch.randn(700, 3)
    for x in (first, second):
        watched.add(*sampler(x))
    expected = torch.cat([first, second]).square().mean(dim=0).sqrt()
    assert torch.allclose(watched.channel_rms(), expected)


@pytest.fixture(scope="module")
def outlying(tiny, tmp_path_factory) -> Path:
    """A checkpoint whose feed-forwards have inner channels that are 30 times as large as others."""
    checkpoint = clone(tiny.checkpoint, tmp_path_factory.mktemp("outlying") / "ckpt")
    for layer in range(4):
        for name in ("weight", "bias"):
            change_dit(base_of(checkpoint), f"blocks.{layer}.ffn.0.{name}", larger)
    return checkpoint


def larger(tensor: torch.Tensor) -> torch.Tensor:
    tensor[LARGE] *= 30
    return tensor


REST = ("--vae", "fp32", "--text-encoder", "fp32")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, args)])


@pytest.fixture(scope="module")
def calibrated(outlying) -> Path:
    path = outlying.with_name("calibrated")
    result = run("--ckpt-dir", outlying, "--out", path, *REST, "--calibrate", "--calibrate-size", "128*128")
    assert result.exit_code == 0, result.output
    return path


def test_its_file_has_every_weight_whose_inputs_may_be_smoothed(calibrated):
    measured = Measured.of(calibrated).by_weight
    component = Artifact.open(calibrated).component("dit")
    shapes = {spec.name: spec.shape for slab in component.slab_names for spec in component.slab_specs(slab)}
    Measured.of(calibrated).check(shapes)
    assert len(measured) == 4 * 8 + 2 * 2
    ffn = measured["blocks.0.ffn.2.weight"]
    assert ffn.shape == (216,)
    assert (ffn[LARGE] > 10 * ffn.median()).all()
    q, k, v = (measured[f"blocks.1.self_attn.{name}.weight"] for name in "qkv")
    assert torch.equal(q, k)
    assert torch.equal(q, v)


def test_latents_are_better_with_it(tiny, outlying, calibrated, tmp_path):
    request = tiny.request(num_clip=1)
    rest = {"vae": "fp32", "text_encoder": "fp32"}
    exact = latents(convert(outlying, tmp_path / "fp32", dit="fp32", **rest), request)
    better = convert(outlying, tmp_path / "better", activations=calibrated, **rest)
    component = Artifact.open(better).component("dit")
    check_complete(build_dit(component), component)
    assert sum(component.tensor_smoothed(name) for name in component.tensor_names) == 4 * 8 + 2 * 2
    plain, measured = (((latents(path, request) - exact).norm() / exact.norm()).item() for path in (calibrated, better))
    assert 1e-4 < measured < 0.85 * plain


def test_it_is_one_option(outlying, calibrated, tmp_path):
    result = run("--ckpt-dir", outlying, "--out", tmp_path / "out", *REST, "--activations", calibrated)
    assert result.exit_code == 0, result.output
    again = convert(outlying, tmp_path / "again", vae="fp32", text_encoder="fp32", activations=calibrated)
    assert contents(tmp_path / "out") == contents(again)
    digest = json.loads((calibrated / MANIFEST).read_text())["calibration"]["activations"]["sha256"]
    facts = describe(again)
    assert facts["components"]["dit"]["activations_sha256"] == digest
    assert f"smoothed, channel by channel, by measured activations, sha256 {digest[:16]}" in summary(facts)


def test_of_other_files_it_is_taken_and_said(tiny, outlying, calibrated, tmp_path, caplog):
    convert(outlying, tmp_path / "same", components=("dit",), activations=calibrated)
    assert "--activations" not in caplog.text
    convert(outlying, tmp_path / "other", components=("dit",), activations=calibrated, lora=tiny.lora, lora_alpha=2.0)
    assert f"{calibrated} was not made from {tiny.lora.name}" in caplog.text


def test_calibrated_again_it_says_the_new_file_alone(outlying, calibrated, tmp_path):
    path = clone(calibrated, tmp_path / "artifact")
    before = json.loads((path / MANIFEST).read_text())["calibration"]["activations"]["file"]
    options = ("--calibrate", "--calibrate-size", "128*128", "--calibrate-prompt", "She sings")
    result = run("--ckpt-dir", outlying, "--out", path, *REST, *options)
    assert result.exit_code == 0, result.output
    after = json.loads((path / MANIFEST).read_text())["calibration"]["activations"]["file"]
    assert [file.name for file in path.glob("activations.*")] == [after]
    assert after != before
    assert (calibrated / before).is_file()


def changed(values: dict[str, torch.Tensor], name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    kept = {key: tensor for key, tensor in values.items() if key != name}
    return kept if value is None else kept | {name: value}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("blocks.0.ffn.2.weight", None, "lack blocks.0.ffn.2.weight"),
        ("blocks.9.ffn.2.weight", torch.ones(216), "of blocks.9.ffn.2.weight do not fit"),
        ("blocks.0.ffn.2.weight", torch.ones(80), "of blocks.0.ffn.2.weight do not fit"),
        ("blocks.0.ffn.2.weight", torch.full((216,), float("nan")), "of blocks.0.ffn.2.weight"),
        ("blocks.0.ffn.2.weight", -torch.ones(216), "of blocks.0.ffn.2.weight"),
    ],
)
def test_of_another_model_it_is_refused(outlying, calibrated, tmp_path, name, value, said):
    path = clone(calibrated, tmp_path / "artifact")
    file = next(path.glob("activations.*"))
    data = safetensors.torch.save(changed(safetensors.torch.load_file(file), name, value))
    file.unlink()
    file.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    replace_json(path / MANIFEST, lambda m: m["calibration"]["activations"].update(sha256=digest))
    with pytest.raises(CheckpointError, match=f"another model: its activations {said}"):
        convert(outlying, tmp_path / "out", components=("dit",), activations=path)


def test_a_file_that_has_changed_or_gone_is_refused(outlying, calibrated, tmp_path):
    path = clone(calibrated, tmp_path / "artifact")
    file = next(path.glob("activations.*"))
    data = file.read_bytes()
    file.unlink()
    for content in (None, data[:-1] + b"\0"):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(CheckpointError, match="not there as it was written; calibrate"):
            convert(outlying, tmp_path / "out", components=("dit",), activations=path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dit": "fp8"}, "whose DiT is fp8"),
        ({"dit": "bf16"}, "whose DiT is bf16"),
        ({"smooth": False}, "whose DiT is int8, not smoothed"),
        ({"components": ("vae",)}, "without a DiT"),
    ],
)
def test_with_nothing_to_smooth_it_is_refused(outlying, calibrated, tmp_path, options, said):
    with pytest.raises(ConfigError, match=f"--activations were given for an artifact {said}"):
        convert(outlying, tmp_path / "out", activations=calibrated, **options)


def test_of_what_was_not_calibrated_it_is_refused(tiny, outlying, tmp_path):
    with pytest.raises(CheckpointError, match="has no measured activations; calibrate it first"):
        convert(outlying, tmp_path / "out", activations=tiny.artifact("int8"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="convert"):
        convert(outlying, tmp_path / "out", activations=tmp_path / "empty")


def test_the_artifact_may_not_be_the_one_that_is_made(outlying, calibrated):
    with pytest.raises(InputError, match="--activations"):
        convert(outlying, calibrated, activations=calibrated, overwrite=True)


def test_what_is_measured_on_takes_them_too(outlying, calibrated):
    """``--measure-on`` puts layers in int8 as ``convert`` will store them."""
    original = original_of(outlying, activations=calibrated)
    _, factors = original.int8("blocks.0.ffn.2.weight")
    assert factors is not None
    assert (factors[LARGE] < factors.median()).all()
