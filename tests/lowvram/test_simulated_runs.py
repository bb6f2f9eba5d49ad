"""Whole runs of the runtime on the simulated GPU."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from lowvram.media.samples import draw_portrait, synth_voice, write_wav
from lowvram.offload.placement import MemoryOptions, Placement
from lowvram.pipeline import AvatarPipeline, Request
from lowvram.planning.workload import Workload
from lowvram.planning.workspace import decoder_cache
from lowvram.simulate.device import SimulatedDevice
from lowvram_quantize.format import Artifact
from lowvram_quantize.shape_artifact import write_shape_artifact

GIB = 1 << 30
META = torch.device("meta")


def simulated_run(
    gpu: SimulatedDevice, artifact, request: Request, placement: Placement
) -> tuple[list[tuple[int, ...]], AvatarPipeline]:
    memory = MemoryOptions(placement=placement)
    pipeline = AvatarPipeline(Artifact.open(artifact), META, "bfloat16", memory=memory, engine=gpu.engine)
    return [frames.shape for frames in pipeline.stream(request)], pipeline


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_the_tiny_model_runs_from_end_to_end(tiny, precision):
    path = tiny.artifact(precision)
    with SimulatedDevice() as gpu:
        shapes, pipeline = simulated_run(gpu, path, tiny.request(), Placement())
    assert [shape[0] for shape in shapes] == [9, 4, 12, 4]
    assert {shape[1:] for shape in shapes} == {(128, 128, 3)}
    artifact = Artifact.open(path)
    layers = [f"layer.{i}" for i in range(4)]
    weights = sum(artifact.component("dit").slab_nbytes(slab) for slab in ["start", "shared", *layers])
    peaks = {stage.name: stage.peak_vram_allocated_bytes for stage in pipeline.runtime.stages.stages.values()}
    assert min(peaks["denoise"], peaks["decode"]) > weights
    assert gpu.h2d_bytes > weights
    assert gpu.d2h_bytes >= sum(int(np.prod(shape)) for shape in shapes)


def test_streaming_trades_memory_for_traffic(tiny):
    path, figures = tiny.artifact("bf16"), {}
    for name, streamed in (("resident", ()), ("streamed", (0, 1, 2, 3))):
        with SimulatedDevice() as gpu:
            _, pipeline = simulated_run(gpu, path, tiny.request(), Placement(streamed_layers=streamed))
        figures[name] = pipeline.runtime.stages.stages["denoise"].peak_vram_allocated_bytes, gpu.h2d_bytes
    assert figures["streamed"][0] < figures["resident"][0]
    assert figures["streamed"][1] > figures["resident"][1]


def test_the_same_run_has_the_same_peaks(tiny):
    path, seen = tiny.artifact("int8"), []
    for _ in range(2):
        with SimulatedDevice() as gpu:
            _, pipeline = simulated_run(gpu, path, tiny.request(num_clip=1), Placement())
        stages = {s.name: (s.peak_vram_allocated_bytes, s.calls) for s in pipeline.runtime.stages.stages.values()}
        seen.append((stages["denoise"], stages["decode"], gpu.h2d_bytes, gpu.d2h_bytes, gpu.kernel_count))
    assert seen[0] == seen[1]


@pytest.mark.slow
def test_the_full_model_runs_in_seconds(tmp_path):
    """One clip of the 14B at 704*384, its weights on the device and its rings on the host in int8."""
    artifact = write_shape_artifact(tmp_path / "14b")
    rings = tuple((step, layer) for step in range(4) for layer in range(40))
    draw_portrait(704, 384).save(tmp_path / "portrait.png")
    write_wav(tmp_path / "voice.wav", synth_voice(3.0), 16000)
    request = Request(
        image=tmp_path / "portrait.png", audio=tmp_path / "voice.wav", prompt="A person speaks", num_clip=1
    )
    begin = time.perf_counter()
    with SimulatedDevice(generation=89) as gpu:
        shapes, pipeline = simulated_run(gpu, artifact, request, Placement(host_rings=rings, kv="int8"))
    for stage in pipeline.runtime.stages.to_json():
        allocated, reserved = stage["peak_vram_allocated_bytes"] / GIB, stage["peak_vram_reserved_bytes"] / GIB
        print(f"{stage['name']:14}{stage['seconds']:6.1f} s  {allocated:7.3f} GiB allocated {reserved:7.3f} reserved")
    print(f"{time.perf_counter() - begin:.1f} s for {len(shapes)} blocks, {gpu.kernel_count} kernels")
    assert sum(shape[0] for shape in shapes) == 45
    peaks = {s["name"]: s["peak_vram_allocated_bytes"] / GIB for s in pipeline.runtime.stages.to_json()}
    assert 6.2 < peaks["encode_text"] < 6.8
    assert 15.5 < peaks["load_dit"] < peaks["denoise"] < 24
    # In the first clip a block sees the ones before it, so that 0 + 1 + 2 + 3 of 4 slots are read; each is written.
    slots = 2 * 3168 * 40 * (128 + 2) + 2 * 40 * 128
    weights = sum(file.stat().st_size for file in artifact.rglob("*.safetensors"))
    # The decoder's cache goes out when it is primed and behind each block.
    cache = decoder_cache(96, Workload.of_size("704*384"))
    assert gpu.d2h_bytes == pytest.approx(4 * 160 * slots + 5 * cache, rel=0.01)
    assert gpu.h2d_bytes == pytest.approx(weights + 6 * 160 * slots, rel=0.01)
