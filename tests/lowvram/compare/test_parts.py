"""A candidate's VAE and its KV rings, each alone: nothing of the one is in the figures of the other, or of the DiT."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from lowvram.compare import ring_errors as rings_module
from lowvram.compare import scoring
from lowvram.compare.comparison import compare
from lowvram.compare.metrics import psnr, ssim
from lowvram.compare.page import render
from lowvram.compare.result import LOWER_BOUNDS, UPPER_BOUNDS, parse_fail_under
from lowvram.compare.ring_errors import LayerRings, RingErrors, ring_errors
from lowvram.compare.sources import open_source
from lowvram.compare.tables import print_comparison
from lowvram.compare.vae_errors import Likeness, VaeErrors, vae_errors
from lowvram.denoise.kv_format import Int8Format
from lowvram.infer import infer
from lowvram.offload.placement import MemoryOptions, Placement
from lowvram.outputs import Outputs
from lowvram.pipeline import AvatarPipeline
from lowvram_kernels import ring_codec
from lowvram_kernels.errors import ConfigError, InputError, OutOfMemoryError
from lowvram_quantize.convert import convert
from tests.lowvram.compare.calls import score
from tests.lowvram.compare.test_page import Reader, latents_alone

VAE = ("vae_psnr", "vae_psnr_min", "vae_ssim", "vae_ssim_min", "vae_portrait_psnr", "vae_portrait_ssim")
RINGS = (
    "ring_velocity_error",
    "ring_attention_error",
    "ring_attention_error_max",
    "ring_key_error",
    "ring_value_error",
)
REQUEST = {"num_clip": 1}  # two blocks, the second shorter


@pytest.fixture(scope="module")
def baseline(tiny, tmp_path_factory):
    return baseline_of(tiny, tmp_path_factory.mktemp("baseline"))


def baseline_of(files, folder):
    """(a run of the fp32 artifact with its dump, the pipeline that made it)."""
    pipeline = AvatarPipeline.from_artifact(files.artifact("fp32"), device="cpu")
    places = Outputs.in_folder(folder, "baseline", "--out-dir", overwrite=False)
    infer(pipeline, files.request(**REQUEST), places, quiet=True)
    return open_source(places.report), pipeline


def ready(artifact, tiny, **memory):
    """A pipeline that has made a video's first frames."""
    pipeline = AvatarPipeline.from_artifact(artifact, device="cpu", memory=MemoryOptions(**memory))
    with contextlib.closing(pipeline.stream(tiny.request(**REQUEST))) as frames:
        next(frames)
    return pipeline


def test_a_vae_has_no_error_against_itself(tiny, baseline):
    source, pipeline = baseline
    found = vae_errors(pipeline, source, tiny.request(**REQUEST), None, quiet=True)
    assert (found.blocks, found.of_blocks, len(found.frames)) == (2, 2, 13)  # 4 * 4 less the 3 that are dropped
    assert all(frame == Likeness(psnr=math.inf, ssim=1.0) for frame in found.frames)
    assert found.values["vae_psnr"] == math.inf
    assert 0 < found.portrait.psnr < 60


def test_a_vae_in_8_bit_is_measured_apart_from_the_dit(wide, tmp_path):
    """Of latents that only the VAE differs for, the whole run's frames and those of the VAE alone are the same."""
    source, _ = baseline_of(wide, tmp_path)
    request = wide.request(**REQUEST)
    convert(wide.checkpoint, tmp_path / "vae", precision="fp32", vae="int8", lora=wide.lora, lora_alpha=2.0)
    other_vae = ready(tmp_path / "vae", wide)
    frames = torch.cat([torch.from_numpy(frames.copy()) for frames in other_vae.stream(request)])
    one_block = vae_errors(other_vae, source, request, None, blocks=1, quiet=True)
    assert (one_block.blocks, one_block.of_blocks, len(one_block.frames)) == (1, 2, 9)
    assert one_block.values["vae_psnr_min"] <= one_block.values["vae_psnr"] < 60
    # Its encoder has made the motion latents of its own run, which prime the decoder; of later frames less is left.
    last, theirs = frames[8].numpy(), list(source.dump.frames().source.read())[8]
    assert one_block.frames[8].psnr == pytest.approx(psnr(last, theirs), abs=6)
    assert one_block.frames[8].ssim == pytest.approx(ssim(last, theirs), abs=0.05)


@pytest.mark.parametrize("lacking", ["latents", "frames", "motion_latents", "everything"])
def test_a_baseline_that_kept_too_little_says_nothing_of_a_vae(tiny, baseline, tmp_path, lacking):
    source, pipeline = baseline
    tensors = load_file(source.dump.path)
    kept = {name: t for name, t in tensors.items() if not name.startswith(lacking) and lacking != "everything"}
    path = tmp_path / "dump.safetensors"
    save_file(kept or {"context": torch.ones(3)}, path)
    assert vae_errors(pipeline, open_source(path), tiny.request(**REQUEST), None, quiet=True) is None


def test_latents_of_another_request(tiny, baseline, reference):
    source = open_source(reference / "baseline.json")
    with pytest.raises(InputError, match="a block of 1 latent frames, and one of 48 frames a clip has 3"):
        vae_errors(baseline[1], source, tiny.request(infer_frames=48), None, quiet=True)


@pytest.mark.parametrize(
    "memory",
    [
        {"kv": "int8"},
        {"kv": "int8", "wave": 2},
        {"kv": "int8", "offload_kv_cache": True},
        {"kv": "int8", "offload_model": True},
        {"placement": Placement(kv="int8")},
    ],
)
def test_rings_in_8_bit(tiny, memory):
    found = ring_errors(ready(tiny.artifact("fp32"), tiny, **memory), tiny.request(**REQUEST), quiet=True)
    assert (found.kv, found.blocks, found.of_blocks, found.attention_of) == ("int8", 2, 2, (0, 1))
    assert (len(found.layers), len(found.by_step)) == (4, 2)
    assert 0 < found.velocity < 0.01
    for layer in (found.together, *found.layers):
        assert 0 < layer.attention < 0.02
        assert 0.001 < layer.keys < 0.02  # half a step of 254 at the most, and of the largest value
        assert 0.001 < layer.values < 0.02
    assert min(layer.keys for layer in found.layers) <= found.together.keys <= max(x.keys for x in found.layers)
    assert found.values["ring_attention_error_max"] == max(layer.attention for layer in found.layers)


@pytest.mark.parametrize("kv", ["auto", "bf16"])
def test_rings_that_lose_nothing_are_not_measured(tiny, monkeypatch, kv):
    monkeypatch.setattr(rings_module, "record", lambda *_a, **_m: pytest.fail("nothing is to be measured"))
    assert ring_errors(ready(tiny.artifact("fp32"), tiny, kv=kv), tiny.request(**REQUEST), quiet=True) is None


def test_what_is_measured_is_what_the_rings_hold(tiny, monkeypatch):
    """Values that come back half as large are half wrong, and attention is wrong by as much."""
    honest = Int8Format.write
    monkeypatch.setattr(Int8Format, "write", lambda self, block, k, v: honest(self, block, k, 0.5 * v))
    found = ring_errors(ready(tiny.artifact("fp32"), tiny, kv="int8"), tiny.request(**REQUEST), blocks=1, quiet=True)
    assert (found.blocks, found.of_blocks, found.attention_of) == (1, 2, (0,))
    assert all(layer.values == pytest.approx(0.5, abs=0.01) for layer in found.layers)
    assert all(layer.keys < 0.02 for layer in found.layers)


def test_a_score_has_both(tiny, reference, tmp_path):
    page = tmp_path / "page.html"
    bounds = [f"--fail-under={name}={'0' if name in LOWER_BOUNDS else '1'}" for name in VAE + RINGS]
    done = score(
        reference, tiny.artifact("int8"), "--kv", "int8", "--html", page, "--teacher-forced-blocks", "1", *bounds
    )
    assert done.exit_code == 0, (done.output, done.exception)
    facts = json.loads(Reader(page.read_text()).scripts["comparison"])
    assert set(VAE + RINGS) < set(facts["values"])
    assert [threshold["metric"] for threshold in facts["thresholds"]] == [*VAE, *RINGS]
    vae, rings = facts["vae"], facts["rings"]
    assert vae["baseline_portrait"]["psnr"] != vae["portrait"]["psnr"]
    assert len(vae["frames"]) == 13 + 16
    assert (rings["kv"], rings["kv_format"]) == ("int8", ring_codec.FORMAT)
    for table in ("VAE alone", "KV rings alone: relative error"):
        assert table in done.stdout
    assert all(f'<table id="{name}">' in page.read_text() for name in ("vae", "rings"))


def parts():
    vae = VaeErrors(
        frames=(Likeness(psnr=math.inf, ssim=1.0), Likeness(psnr=41.25, ssim=0.98)),
        blocks=1,
        of_blocks=3,
        portrait=Likeness(psnr=33.5, ssim=0.9),
        baseline_portrait=Likeness(psnr=34.5, ssim=0.91),
        seconds=1.0,
    )
    layers = (LayerRings(attention=0.01, keys=0.002, values=0.003), LayerRings(attention=0.5, keys=0.0, values=0.25))
    rings = RingErrors(
        kv="int8", kv_format=2, velocity=0.0625, by_step=(0.0625, 0.125), layers=layers, together=layers[0],
        blocks=2, of_blocks=2, attention_of=(0, 1), seconds=2.0,
    )  # fmt: skip
    return vae, rings


SHOWN = {
    "vae": ("VAE alone", "41.25", "0.98000", "33.50", "34.50", "the first 1 of 3 blocks"),
    "rings": ("KV rings alone", "50 %", "25 %", "0.2 %", "6.25 %", "all 2 blocks"),
}


@pytest.mark.parametrize("there", [(), ("vae",), ("rings",), ("vae", "rings")])
def test_what_is_shown_and_what_is_absent(tmp_path, there):
    known = dict(zip(("vae", "rings"), parts(), strict=True))
    result = dataclasses.replace(compare(*latents_alone(tmp_path)), **{name: known[name] for name in there})
    console = Console(file=io.StringIO(), width=200)
    print_comparison(result, console)
    facts = result.to_json()
    for name, texts in SHOWN.items():
        for text in (console.file.getvalue(), render(result)):
            assert all(piece in text for piece in texts) if name in there else texts[0] not in text
        assert (facts[name] is not None) == (name in there)
    assert all((name in facts["values"]) == ("vae" in there) for name in VAE)
    assert all((name in facts["values"]) == ("rings" in there) for name in RINGS)


@pytest.mark.parametrize("name", [*VAE, *RINGS])
def test_bounds(tmp_path, name):
    vae, rings = parts()
    plain = compare(*latents_alone(tmp_path))
    result = dataclasses.replace(plain, vae=vae, rings=rings)
    value, upper = result.values[name], name in RINGS
    assert upper == (name in UPPER_BOUNDS)
    for bound in (value - 0.001, value, value + 0.001):
        met = result.check(parse_fail_under([f"{name}={bound!r}"])) == []
        assert met == (value <= bound if upper else value >= bound)
    with pytest.raises(ConfigError, match=rf"names {name}.*\(--model\)"):
        plain.check({name: 1.0})


def test_rings_that_lose_nothing_may_not_fit(tmp_path, monkeypatch):
    def too_large(*_arguments, **_more):
        raise OutOfMemoryError("160 rings take 48 GiB")

    monkeypatch.setattr(scoring, "ring_errors", too_large)
    monkeypatch.setattr(scoring, "vae_errors", lambda *_a, **_m: parts()[0])
    found = scoring._each_alone(compare(*latents_alone(tmp_path)), None, None, None, None, quiet=True)
    assert found.vae == parts()[0]
    assert found.rings is None
    assert any("160 rings take 48 GiB" in warning for warning in found.warnings)
