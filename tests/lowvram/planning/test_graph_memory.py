"""Room for CUDA graphs: only where they are wanted and something is captured."""

from __future__ import annotations

import dataclasses

import pytest

from lowvram.offload.placement import Placement, PlanOptions
from lowvram.planning import CARDS, Workload
from lowvram.planning.planner import plan
from lowvram.planning.rank_layout import ParallelLayout, share_of, whole
from lowvram.planning.search import Job
from lowvram.planning.workspace import GRAPH_BYTES, graph_bytes, layer_workspace

GIB = 1 << 30
WORK = Workload.of_size("704*384")


def test_graphs_take_room_in_a_plan_that_has_them(sizes):
    there = {"vram_bytes": 20 * GIB, "ram_bytes": 64 * GIB, "card": CARDS["rtx4090"]}
    without, having = (plan(sizes("int8"), WORK, PlanOptions(cuda_graphs=on), **there) for on in (False, True))
    assert without.device.graphs == 0
    assert 0.5 * GIB < having.device.graphs < 1.5 * GIB
    assert having.peak_vram_bytes <= 20 * GIB
    assert len(having.placement.host_rings) > len(without.placement.host_rings)


def test_room_is_for_inputs_of_every_step_and_one_layer_at_work(sizes):
    model = sizes("int8")
    config, share = model.config, whole(model.config, WORK)
    none = graph_bytes(model, WORK, Placement(streamed_layers=tuple(range(40))), share)
    rings = tuple((step, layer) for step in range(4) for layer in range(40))
    assert none == graph_bytes(model, WORK, Placement(host_rings=rings), share) == 0
    every = graph_bytes(model, WORK, Placement(), share)
    one = graph_bytes(model, WORK, Placement(streamed_layers=tuple(range(1, 40)), host_rings=rings[:1]), share)
    assert every - one == (160 - 3) * WORK.blocks_per_clip * GRAPH_BYTES
    residual = WORK.block_tokens * config.dim * 4
    seen = WORK.ring_tokens + WORK.sink_tokens
    pool = layer_workspace(config, WORK.block_tokens, quantized=True, seen_tokens=seen).peak
    assert 4 * residual + pool < one < 1.3 * (4 * residual + pool)
    uneven = dataclasses.replace(WORK, infer_frames=40)
    assert graph_bytes(model, uneven, Placement(), share) - every > 3 * residual


def test_int8_rings_want_room_for_rotated_keys(sizes):
    plain, int8 = (
        Job(sizes=sizes("int8"), work=WORK, kv=kv).device_parts(Placement(kv=kv)).rollout_inputs
        for kv in ("plain", "int8")
    )
    assert int8 - plain >= WORK.sink_tokens * sizes("int8").config.dim


@pytest.mark.parametrize("wanted", [False, True])
def test_ranks_that_exchange_have_none(sizes, wanted):
    layout = ParallelLayout(num_gpus_dit=2, ulysses_size=2)
    job = Job(sizes=sizes("int8"), work=WORK, kv="int8", layout=layout, options=PlanOptions(cuda_graphs=wanted))
    assert job.device_parts(Placement()).graphs == 0
    assert share_of(job.sizes.config, WORK, layout, 0).exchanges
