"""What the int8 of single layers costs: measured by putting them in int8, and what convert makes of it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from click.testing import CliRunner

from lowvram.calibrate.contributions import _in_int8, _Int8, contributions
from lowvram.cli import main
from lowvram.compare.teacher_forcing import force, record
from lowvram.offload.placement import MemoryOptions
from lowvram.pipeline import AvatarPipeline
from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.format import Artifact
from lowvram_quantize.units import units_of


@pytest.fixture(scope="module")
def request_(tiny):
    return tiny.request(num_clip=1)


@pytest.fixture(scope="module")
def units(original) -> dict[str, list[str]]:
    found = {unit: [item.name for item in items] for unit, items in units_of(original.plan.items).items()}
    return {unit: names for unit, names in found.items() if not unit.startswith("frame_packer")}


@pytest.fixture(scope="module")
def parts(tiny, original, request_, units) -> dict[str, float]:
    return contributions(Artifact.open(tiny.artifact("bf16")), original, request_, units, device="cpu", quiet=True)


def test_parts_add_up_to_the_error_of_the_whole(tiny, parts, request_):
    bf16 = AvatarPipeline.from_artifact(tiny.artifact("bf16"), device="cpu")
    int8 = AvatarPipeline.from_artifact(tiny.artifact("int8"), device="cpu")
    forced = force(int8, request_, record(bf16, request_, blocks=1), blocks=1, quiet=True)
    assert math.sqrt(sum(parts.values())) == pytest.approx(forced.values["velocity_error"], rel=0.35)


def test_every_unit_has_a_part_of_its_own(parts, units):
    assert list(parts) == list(units)
    assert all(part > 0 for part in parts.values())
    assert max(parts.values()) > 10 * min(parts.values())


def test_streamed_layers_are_measured_too(tiny, original, request_, units, parts):
    some = {unit: units[unit] for unit in list(units)[::9]}
    memory = MemoryOptions(offload_model=True)
    artifact = Artifact.open(tiny.artifact("bf16"))
    found = contributions(artifact, original, request_, some, device="cpu", memory=memory, quiet=True)
    assert found == pytest.approx({unit: parts[unit] for unit in some})


def test_the_run_itself_is_what_it_was(tiny, original, request_, units):
    """Behind the measuring it goes on where it was."""
    pipeline = AvatarPipeline.from_artifact(tiny.artifact("bf16"), device="cpu")
    plain = [latent for _, latent in pipeline.denoise(request_, lambda rollout, blocks: None)]

    def begun(rollout, _blocks: int) -> None:
        int8 = _Int8(pipeline.runtime.artifact.component("dit"), original)
        for names in units.values():
            with _in_int8(rollout, names, int8):
                pass

    again = [latent for _, latent in pipeline.denoise(request_, begun)]
    assert all(torch.equal(*pair) for pair in zip(plain, again, strict=True))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_another_precision_is_refused(tiny, original, request_, precision):
    artifact = Artifact.open(tiny.artifact(precision))
    with pytest.raises(CheckpointError, match=f"has a DiT in {precision}; expected one in bf16"):
        contributions(artifact, original, request_, {}, device="cpu", quiet=True)


def arguments(tiny, out, *more: str) -> list[str]:
    source = ["--ckpt-dir", str(tiny.checkpoint), "--lora", str(tiny.lora), "--lora-alpha", "2"]
    return ["convert", *source, "--out", str(out), *more]


def test_convert_measures_and_chooses(tiny, tmp_path):
    given = ("--precision", "auto", "--max-error", "0.006", "--measure-on", str(tiny.artifact("bf16")), "--json")
    result = CliRunner().invoke(main, arguments(tiny, tmp_path / "auto", *given, "--device", "cpu"))
    assert result.exit_code == 0, result.output
    choice = json.loads(result.stdout)["components"]["dit"]["choice"]
    assert choice["measured"] is True
    assert choice["predicted_error"] <= 0.006
    assert "by what a run measured" in CliRunner().invoke(main, ["inspect", str(tmp_path / "auto")]).output


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (["--measure-on", "bf16"], "--measure-on is for --precision auto"),
        (["--dit", "bf16", "--precision", "auto", "--measure-on", "bf16"], "--measure-on is for --precision auto"),
        (["--precision", "auto", "--measure-on", "bf16"], "--target-bytes, as 17GB, or within --max-error, as 0.02"),
        (["--precision", "auto", "--max-error", "0.01", "--measure-on", "int8"], "expected one in bf16"),
        (["--precision", "auto", "--max-error", "0.01", "--measure-on", "nothing"], "nothing"),
        (["--precision", "auto", "--max-error", "0.01", "--measure-on", "bf16", "--lora-alpha", "3"], "other LoRAs"),
        (["--precision", "auto", "--max-error", "0.01", "--device", "cpu"], "with --calibrate or --measure-on only"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_made(tiny, tmp_path, given, part):
    for name in ("int8", "bf16"):
        given = [
            str(tiny.artifact(name)) if word == name and given[i - 1] == "--measure-on" else word
            for i, word in enumerate(given)
        ]
    result = CliRunner().invoke(main, arguments(tiny, tmp_path / "out", *given))
    assert result.exit_code == 2, result.output
    assert part in result.stderr
    assert list(tmp_path.iterdir()) == []
