"""Reference cases end to end, in float32: every folder of $LOWVRAM_GOLDEN (default tests/golden)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from lowvram.cli import main
from lowvram.denoise import kv_format
from lowvram.denoise.rollout import Rollout, RolloutSettings
from lowvram.loading.weights import build_dit, load_shared
from lowvram.media.sizes import output_size
from lowvram.offload.copy_engine import Engine
from lowvram.offload.layers import Layers
from lowvram.offload.placement import Placement
from lowvram.schedule import Block, blocks_of
from lowvram_kernels.ring_attention import stepwise_attention
from lowvram_kernels.ring_codec import rotate_block
from lowvram_models.audio_encoder import audio_embedding
from lowvram_models.dit import CausalDiT
from lowvram_quantize.convert import convert
from lowvram_quantize.format import Artifact, Component
from tests.golden_cases import ROOT, Case, cases, relative_error

pytestmark = pytest.mark.golden
CPU = torch.device("cpu")


def test_there_are_cases():
    assert cases("dit") or cases("pipeline"), f"{ROOT} holds no case folder (one with a case.json)"


def rollout_of(
    case: Case, dit: CausalDiT, component: Component, on_prediction: Callable[[Block, int, torch.Tensor], None]
) -> Rollout:
    settings, inputs, engine = case.settings, case.tensors("inputs"), Engine(CPU)
    return Rollout(
        dit,
        Layers(dit, component, engine, torch.float32),
        inputs["context"],
        RolloutSettings(
            frames_per_clip=settings["latent_frames_per_clip"],
            latent_size=tuple(inputs["noise"].shape[-2:]),
            frames_per_block=settings["frames_per_block"],
            sample_steps=settings["sample_steps"],
            cond_rope_distance=settings["cond_rope_distance"],
        ),
        dtype=torch.float32,
        engine=engine,
        placement=Placement(),
        on_prediction=on_prediction,
    )


@pytest.mark.parametrize("case", cases("dit"), ids=lambda c: c.folder.name)
def test_dit_alone(case: Case, tmp_path: Path):
    settings, inputs, golden = case.settings, case.tensors("inputs"), case.tensors("outputs")
    component = Artifact.open(
        convert(case.folder, tmp_path / "artifact", precision="fp32", components=("dit",))
    ).component("dit")
    dit = build_dit(component)
    load_shared(dit, component, CPU, torch.float32)
    errors: dict[str, float] = {}

    def check(name: str, value: torch.Tensor) -> None:
        errors[name] = relative_error(value, golden[name])

    def on_prediction(block, step, velocity):
        index = block.offset // settings["frames_per_block"]
        check(f"noise_pred.clip{block.clip}.block{index}.step{step}", velocity)

    rollout = rollout_of(case, dit, component, on_prediction)
    rollout.prefill(inputs["ref_latents"][0], inputs["motion_latents"][0])
    latents = torch.zeros_like(golden["latents"])
    per_clip = settings["latent_frames_per_clip"]
    for block in blocks_of(settings["clips"], per_clip, settings["frames_per_block"]):
        frames = slice(block.offset, block.offset + block.frames)
        masks = inputs["actor_mask"][:, frames].flatten(2, 3) if "actor_mask" in inputs else None
        audio = inputs["audio_emb"][..., 4 * block.first_frame : 4 * (block.first_frame + block.frames)]
        latents[block.clip][:, frames] = rollout.denoise(
            block,
            inputs["noise"][block.clip][:, frames],
            audio,
            pose_CFhw=inputs["cond_states"][0][:, frames],
            actor_masks=masks,
        )
    check("latents", latents)
    for index in range(dit.config.num_layers):
        keys, values = rollout.sink.read(index, torch.float32)
        check(f"cond_k.{index}", keys)
        check(f"cond_v.{index}", values)
    for name in (n for n in golden if n.startswith("kv_")):
        kind, step, layer = name.split(".")
        keys, values = rollout.rings.snapshot(
            int(step.removeprefix("step")), int(layer.removeprefix("layer")), torch.float32
        )
        check(name, keys if kind == "kv_k" else values)
    for name, ours in (("timesteps", rollout.scheduler.timesteps), ("sigmas", rollout.scheduler.sigmas)):
        assert torch.equal(ours, golden[name]), name
    assert set(golden) == set(errors) | {"timesteps", "sigmas"}, "a golden tensor was not compared"
    assert max(errors.values()) < 1e-5, sorted(errors.items(), key=lambda item: -item[1])[:5]


@pytest.fixture(scope="module", params=cases("pipeline"), ids=lambda c: c.folder.name)
def pipeline_case(request, tmp_path_factory) -> tuple[Case, Path]:
    """A case and a folder with its float32 artifact."""
    case: Case = request.param
    out, settings = tmp_path_factory.mktemp("pipeline"), case.settings
    loras = sorted((case.folder / "ckpt" / "LiveAvatar").glob("*.safetensors"))
    lora = ["--lora", loras[0], "--lora_alpha", settings["lora_alpha"]] if loras else []
    run("convert", "--ckpt_dir", case.folder / "ckpt", *lora, "--out", out / "artifact", "--precision", "fp32")
    return case, out


@pytest.fixture(scope="module")
def pipeline_run(pipeline_case) -> tuple[Case, dict[str, torch.Tensor], dict]:
    """A whole case through the command line; gives (case, dumped tensors, report)."""
    case, out = pipeline_case
    dump = inferred(case, out, "out")
    return case, dump, json.loads((out / "out.json").read_text())


def inferred(case: Case, out: Path, name: str, *more) -> dict[str, torch.Tensor]:
    """The tensors that a run of the artifact in ``out`` dumps."""
    settings = case.settings
    run(
        *("infer", "--model", out / "artifact", "--image", case.folder / "inputs/portrait.png"),
        *("--audio", case.folder / "inputs/speech.wav", "--prompt", settings["prompt"], "--out", out / f"{name}.mp4"),
        *("--size", settings["size"], "--infer_frames", settings["infer_frames"], "--num_clip", settings["num_clip"]),
        *("--sample_steps", settings["sample_steps"], "--base_seed", settings["base_seed"], "--device", "cpu"),
        *("--cond-rope-distance", settings["cond_rope_distance"], "--dtype", "float32"),
        *("--dump-tensors", out / f"{name}.safetensors", "--report", out / f"{name}.json", "--quiet", *more),
    )
    return load_file(out / f"{name}.safetensors")


def run(*args) -> None:
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("name", "bound"),
    [("audio_emb", 1e-5), ("context", 1e-5), ("ref_latents", 1e-5), ("motion_latents", 1e-5), ("latents", 1e-4)],
)
def test_pipeline_tensor(pipeline_run, name: str, bound: float):
    case, dump, _ = pipeline_run
    golden = case.tensors("outputs")[name]
    assert dump[name].shape == golden.shape
    assert relative_error(dump[name], golden) < bound


def test_pipeline_tokens(pipeline_run):
    case, dump, _ = pipeline_run
    assert torch.equal(dump["input_ids"], case.tensors("outputs")["input_ids"])


def test_pipeline_frames(pipeline_run):
    case, dump, report = pipeline_run
    golden, frames = case.tensors("outputs"), dump["frames"]
    assert frames.shape[1] == case.settings["frames"] == report["frames"]
    pairs = {
        "first": (frames[:, :9], golden["frames_first9"]),
        "last": (frames[:, -12:], golden["frames_last12"]),
        "mean": (frames.mean(dim=(0, 2, 3)), golden["frame_mean"]),
        "std": (frames.std(dim=(0, 2, 3)), golden["frame_std"]),
    }
    off = {name: (ours - theirs.float()).abs().mean().item() for name, (ours, theirs) in pairs.items()}
    assert max(off.values()) < 2e-4, off


def kernel_arithmetic(q_LNH, blocks, sink, cos_TP, sin_TP, *, rotated=None):
    return stepwise_attention(q_LNH, [*blocks, rotate_block(sink, cos_TP, sin_TP)])


@pytest.mark.parametrize("attend", [None, kernel_arithmetic], ids=["decoded", "as the kernel"])
def test_latents_with_rings_of_8_bits(pipeline_run, pipeline_case, monkeypatch, attend):
    """Against rings in float32: what the rings' format loses, and with queries and weights in 8 bits too."""
    (case, dump, _), (_, out) = pipeline_run, pipeline_case
    if attend:
        monkeypatch.setattr(kv_format, "ring_and_sink_attention", attend)
    latents = inferred(case, out, "as-the-kernel" if attend else "decoded", "--kv", "int8")["latents"]
    assert 0 < relative_error(latents, dump["latents"]) < 5e-4


def _table(name: str) -> list[dict]:
    path = ROOT / name
    return json.loads(path.read_text()) if path.exists() else []


def test_sizes_table():
    rows = _table("sizes.json")
    if not rows:
        pytest.skip(f"{ROOT} has no sizes.json")
    wrong = [r for r in rows if output_size(r["size"], r["image_height"], r["image_width"]) != tuple(r["out"])]
    assert not wrong


def test_audio_buckets_table():
    rows = _table("audio_buckets.json")
    if not rows:
        pytest.skip(f"{ROOT} has no audio_buckets.json")
    for row in rows:
        ramp = torch.arange(1, row["feature_frames_50hz"] + 1, dtype=torch.float32).expand(25, 4, -1)
        embedding = audio_embedding(ramp, row["infer_frames"])
        assert embedding.shape[-1] == row["clips"] * row["infer_frames"]
        assert [round(v, 4) for v in embedding[0, 0, 0].tolist()] == row["values"]
