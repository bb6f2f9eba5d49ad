"""The real runtime on the tiny model, its streams watched: the same latents and frames, and no race."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lowvram import runtime as runtime_module
from lowvram.denoise import denoiser as denoiser_module
from lowvram.denoise.rollout import Rollout
from lowvram.loading.weights import build_dit
from lowvram.offload.copy_engine import Engine
from lowvram.offload.layers import Layers
from lowvram.offload.placement import MemoryOptions, Placement
from lowvram.pipeline import AvatarPipeline
from lowvram.simulate.device import SimulatedDevice
from lowvram_models.dit import CausalDiT
from lowvram_models.vae import StreamingDecoder
from lowvram_quantize.format import Artifact
from tests.lowvram.denoise.test_cuda_graphs import CELLS, LAYERS, Pools, faked, run
from tests.lowvram.offload.test_oom import full
from tests.lowvram.streams.checks import assert_ordered

Tensor = torch.Tensor
ALL_LAYERS = tuple(range(LAYERS))
META = torch.device("meta")


def on(engine: Engine, monkeypatch) -> None:
    """Runs are on ``engine`` from here on."""
    monkeypatch.setattr(runtime_module, "engine_for", lambda device: engine)


@pytest.mark.parametrize(
    ("placement", "precision", "graphs"),
    [
        (Placement(streamed_layers=ALL_LAYERS, host_rings=CELLS, wave=2, kv="int8"), "int8", False),
        (Placement(streamed_layers=(0, 2), host_rings=CELLS[1::2], weight_slots=1, ring_slots=3), "fp32", True),
    ],
)
def test_latents_are_made_in_order(tiny, monkeypatch, placement, precision, graphs):
    def work(engine: Engine) -> Tensor:
        on(engine, monkeypatch)
        faked(monkeypatch, Pools())
        return run(tiny, placement, graphs=graphs, precision=precision).latents

    assert_ordered(monkeypatch, work)


def test_a_run_that_memory_runs_out_in_is_in_order(tiny, monkeypatch):
    """While weights load, while the sink is filled, in a pass, and while a block is decoded."""
    stages: tuple[tuple[Any, str, int], ...] = (
        (denoiser_module, "load_shared", 0),
        (Rollout, "prefill", 0),
        (CausalDiT, "layer", 4 + 4 + 2),
        (StreamingDecoder, "decode", 1),
    )
    placement = Placement(streamed_layers=(1,), host_rings=CELLS[:1])

    def work(engine: Engine) -> Tensor:
        on(engine, monkeypatch)
        with monkeypatch.context() as patch:
            for owner, name, call in stages:
                patch.setattr(owner, name, _failing_once(getattr(owner, name), call))
            pipeline = AvatarPipeline.from_artifact(
                tiny.artifact("fp32"), device="cpu", memory=MemoryOptions(placement=placement)
            )
            frames = [torch.from_numpy(made) for made in pipeline.stream(tiny.request(num_clip=1))]
        assert len(pipeline.run.ladder.events) == len(stages)
        return torch.cat(frames)

    assert_ordered(monkeypatch, work)


def _failing_once(real: Any, at: int) -> Any:
    count = itertools.count()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(count) == at:
            raise full()
        return real(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("slots", [1, 2])
def test_a_place_lets_go_of_the_slots_before_it_takes_new_ones(tiny, slots):
    """All layers stream before and after it: it takes no more memory than was there."""
    component = Artifact.open(tiny.artifact("bf16")).component("dit")
    with SimulatedDevice() as gpu:
        layers = Layers(build_dit(component), component, Engine(META), torch.bfloat16)
        layers.place(ALL_LAYERS, slots)
        for index in ALL_LAYERS:
            layers.enter(index)
            layers.leave(index)
        gpu.reset_peaks()
        before = gpu.allocated
        layers.place(ALL_LAYERS, slots)
        assert gpu.peak_allocated == gpu.allocated == before
        layers.place((), slots)
        assert all(layers.resident(index) for index in ALL_LAYERS)
        del layers  # with its slots, and without a search for cycles
