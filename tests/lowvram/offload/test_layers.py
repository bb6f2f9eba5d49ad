"""What streamed layers hold on the device, where they are stored in another dtype than is computed in and where not."""

from __future__ import annotations

import pytest
import torch

from lowvram.loading.weights import build_dit
from lowvram.offload.copy_engine import Engine
from lowvram.offload.layers import Layers
from lowvram.simulate.device import SimulatedDevice
from lowvram_quantize.format import Artifact, Component
from lowvram_quantize.shape_artifact import RandomFill, write_shape_artifact

META, ALL = torch.device("meta"), (0, 1, 2, 3)
DTYPES = [
    # stored, computed in, whether every tensor of a layer is copied, or some
    ("bf16", torch.float32, "all"),
    ("fp32", torch.bfloat16, "all"),
    ("int8", torch.float32, "some"),
    ("fp8", torch.float32, "some"),
    ("int8", torch.bfloat16, "none"),
    ("bf16", torch.bfloat16, "none"),
    ("fp32", torch.float32, "none"),
]


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("layers"), {}

    def of(precision: str) -> Component:
        if precision not in made:
            path = write_shape_artifact(root / precision, preset="tiny", precision=precision, fill=RandomFill())
            made[precision] = Artifact.open(path).component("dit")
        return made[precision]

    return of


def copies_of(component: Component, index: int, dtype: torch.dtype) -> int:
    """Bytes that a layer's tensors take beside its slab, each in blocks of the allocator."""
    kept = (torch.int8, torch.float8_e4m3fn, dtype)
    found = [s for s in component.slab_specs(f"layer.{index}") if s.dtype not in kept and "weight_scale" not in s.name]
    return sum(-(-spec.nbytes // spec.dtype.itemsize * dtype.itemsize // 512) * 512 for spec in found)


@pytest.mark.parametrize(("precision", "dtype", "copied"), DTYPES)
@pytest.mark.parametrize("slots", [1, 2])
def test_a_streamed_layer_leaves_nothing_behind(components, precision, dtype, copied, slots):
    component = components(precision)
    with SimulatedDevice() as gpu:
        layers = Layers(build_dit(component), component, Engine(META), dtype)
        layers.place(ALL, slots)
        placed = gpu.allocated
        for _ in range(2):
            for index in ALL:
                gpu.reset_peaks()
                layers.enter(index)
                layers.leave(index)
                expected = copies_of(component, index, dtype)
                assert bool(expected) == (copied != "none")
                assert gpu.peak_allocated - placed == expected
                assert gpu.allocated == placed


@pytest.mark.parametrize(("precision", "dtype", "copied"), DTYPES)
def test_what_runs_is_what_was_stored(components, precision, dtype, copied):
    component = components(precision)
    dits = [build_dit(component) for _ in range(2)]
    resident, streamed = (Layers(dit, component, Engine(torch.device("cpu")), dtype) for dit in dits)
    resident.place((), 2)
    streamed.place(ALL, 1)
    for _ in range(2):
        for index in ALL:
            streamed.enter(index)
            names = [spec.name for spec in component.slab_specs(f"layer.{index}")]
            for name in names:
                mine, kept = (dit.get_parameter(name) for dit in dits[::-1])
                assert mine.dtype is kept.dtype
                assert torch.equal(mine, kept)
            streamed.leave(index)
            absent = sum(dits[1].get_parameter(name).is_meta for name in names)
            assert (absent == 0, absent == len(names)) == (copied == "none", copied == "all")
