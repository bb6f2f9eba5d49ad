"""Wherever weights and rings lie, and however many steps share a pass: the latents are the same, bit for bit."""

from __future__ import annotations

import pytest
import torch

from lowvram.offload.placement import MemoryOptions, Placement, placement_on_cpu
from lowvram.pipeline import AvatarPipeline
from lowvram.recorder import TensorRecorder
from lowvram_kernels.errors import ConfigError

STEPS = 3
LAYERS = 4
CELLS = tuple((step, layer) for step in range(STEPS) for layer in range(LAYERS))


def latents(tiny, placement: Placement, precision: str = "fp32", **request) -> torch.Tensor:
    memory = MemoryOptions(placement=placement)
    pipeline = AvatarPipeline.from_artifact(tiny.artifact(precision), device="cpu", memory=memory)
    recorder = TensorRecorder()
    settings = {"sample_steps": STEPS, "infer_frames": 32, "num_clip": 2} | request
    for _ in pipeline.stream(tiny.request(**settings), recorder=recorder):
        pass
    blocks = [tensor for name, tensor in sorted(recorder.tensors().items()) if name.startswith("latents")]
    return torch.cat([block.flatten() for block in blocks])


@pytest.fixture(scope="module")
def plain(tiny) -> torch.Tensor:
    return latents(tiny, Placement())


def test_the_tiny_model_has_the_layers_these_tests_speak_of(tiny):
    pipeline = AvatarPipeline.from_artifact(tiny.artifact("fp32"), device="cpu")
    assert pipeline.runtime.artifact.component("dit").config["num_layers"] == LAYERS


@pytest.mark.parametrize(
    "placement",
    [
        Placement(streamed_layers=(0, 1, 2, 3)),
        Placement(streamed_layers=(1,), weight_slots=1),
        Placement(streamed_layers=(0, 2), weight_slots=3),
        Placement(host_rings=CELLS),
        Placement(host_rings=CELLS, ring_slots=1),
        Placement(host_rings=((0, 1), (2, 0), (2, 2)), ring_slots=3),
        Placement(wave=2),
        Placement(wave=3),
        Placement(wave=8),
        Placement(streamed_layers=(0, 1, 2, 3), host_rings=CELLS, wave=3),
        Placement(streamed_layers=(0, 2), host_rings=CELLS[::2], wave=2, weight_slots=1, ring_slots=1),
    ],
    ids=str,
)
def test_any_placement_gives_the_same_latents(tiny, plain, placement):
    assert torch.equal(latents(tiny, placement), plain)


@pytest.mark.parametrize("kv", ["plain", "int8"])
def test_so_it_does_with_quantized_weights_and_rings(tiny, kv):
    here = latents(tiny, Placement(kv=kv), "int8")
    there = latents(tiny, Placement(kv=kv, streamed_layers=(0, 1, 2, 3), host_rings=CELLS, wave=3), "int8")
    assert torch.equal(here, there)


def test_clips_of_one_block_wait_for_the_refreshed_sink(tiny):
    one_by_one = latents(tiny, Placement(), infer_frames=12, num_clip=3)
    assert torch.equal(latents(tiny, Placement(wave=3), infer_frames=12, num_clip=3), one_by_one)


def test_int8_rings_cost_little_and_not_nothing(tiny, plain):
    off = latents(tiny, Placement(kv="int8")) - plain
    assert 1e-6 < float(off.norm() / plain.norm()) < 0.01


@pytest.mark.parametrize(
    "fields",
    [
        {"kv": "int4"}, {"wave": 0}, {"weight_slots": 0}, {"ring_slots": -1},
        {"streamed_layers": (1, 0)}, {"streamed_layers": (1, 1)}, {"host_rings": ((1, 0), (0, 1))},
    ],
    ids=str,
)  # fmt: skip
def test_placements_that_make_no_sense(fields):
    with pytest.raises(ConfigError, match=r"expected|sorted"):
        Placement(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"kv": "fp4"},
        {"wave": 0},
        {"wave": "2"},
        {"vram_budget": 0},
        {"ram_budget": -1},
        {"allow_quality_loss": True, "fallback": False},
    ],
)
def test_options_that_make_no_sense(fields):
    with pytest.raises(ConfigError, match="expected"):
        MemoryOptions(**fields)


def test_options_do_their_part_on_a_cpu():
    every = placement_on_cpu(
        MemoryOptions(offload_model=True, offload_kv_cache=True, kv="int8", wave=3), LAYERS, range(STEPS), STEPS
    )
    assert every == Placement(streamed_layers=(0, 1, 2, 3), host_rings=CELLS, kv="int8", wave=STEPS)
    assert placement_on_cpu(MemoryOptions(), LAYERS, range(STEPS), STEPS) == Placement()
    with pytest.raises(ConfigError, match="--wave is 4"):
        placement_on_cpu(MemoryOptions(wave=4), LAYERS, range(STEPS), STEPS)


def test_budgets_on_a_cpu_are_said_to_do_nothing(caplog):
    placement_on_cpu(MemoryOptions(vram_budget=1 << 30), LAYERS, range(STEPS), STEPS)
    assert "no effect on a CPU" in caplog.text
