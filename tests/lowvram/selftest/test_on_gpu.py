"""On a card: every check passes or is gone around, and wherever weights and rings lie the latents are the same."""

from __future__ import annotations

import pytest
import torch

from lowvram.offload.placement import MemoryOptions, Placement
from lowvram.pipeline import AvatarPipeline
from lowvram.recorder import TensorRecorder
from lowvram.selftest.examine import selftest
from lowvram_kernels import choices

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STEPS, LAYERS = 3, tuple(range(4))
CELLS = tuple((step, layer) for step in range(STEPS) for layer in LAYERS)


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    return selftest("cuda:0", file=tmp_path_factory.mktemp("cache") / "selftest.json")[0]


def test_nothing_on_the_card_fails_without_a_way_around(examined):
    card, processor = examined
    assert not card.verdict.stuck
    assert not processor.verdict.stuck
    assert {"ring_attention: triton, 14B", "copies with pinning"} <= {result.subject.name for result in card.results}


def test_no_kernel_had_to_be_switched_off(examined):
    assert not examined[0].verdict.off


def latents(tiny, precision: str, placement: Placement, device: str) -> torch.Tensor:
    pipeline = AvatarPipeline.from_artifact(
        tiny.artifact(precision), device=device, memory=MemoryOptions(placement=placement)
    )
    recorder = TensorRecorder()
    request = tiny.request(sample_steps=STEPS, infer_frames=32, num_clip=1)
    for _ in pipeline.stream(request, recorder=recorder):
        pass
    found = [tensor for name, tensor in sorted(recorder.tensors().items()) if name.startswith("latents")]
    return torch.cat([tensor.flatten().cpu() for tensor in found])


@pytest.mark.parametrize(("precision", "kv"), [("int8", "int8"), ("int8", "plain"), ("bf16", "plain")])
@pytest.mark.parametrize(
    "where",
    [
        {"streamed_layers": LAYERS},
        {"streamed_layers": (1,), "weight_slots": 1},
        {"host_rings": CELLS},
        {"host_rings": CELLS[::2], "ring_slots": 1},
        {"streamed_layers": LAYERS, "host_rings": CELLS},
        {"streamed_layers": (0, 2), "host_rings": CELLS[::2], "weight_slots": 1, "ring_slots": 1},
    ],
    ids=str,
)
def test_any_placement_gives_the_same_latents(tiny, precision, kv, where):
    with choices.restored():
        here = latents(tiny, precision, Placement(kv=kv), "cuda:0")
        there = latents(tiny, precision, Placement(kv=kv, **where), "cuda:0")
    assert here.isfinite().all()
    assert torch.equal(here, there)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_card_computes_what_the_first_does(tiny):
    placement = Placement(kv="int8", streamed_layers=(0, 2), host_rings=CELLS[::2])
    assert torch.equal(*(latents(tiny, "int8", placement, f"cuda:{index}") for index in (0, 1)))
