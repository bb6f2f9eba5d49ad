"""Memory that runs out in the middle of a run that streams all of its layers: the real ladder, on a simulated GPU."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from lowvram.denoise.rollout import Rollout
from lowvram.offload.placement import PlanOptions
from lowvram.planning import CARDS, Workload
from lowvram.planning.members import Machines
from lowvram.planning.memory_costs import GIB
from lowvram.planning.planner import plan_team
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.simulate.dry_run import DryRun, dry_run
from lowvram_kernels.errors import OutOfMemoryError
from tests.lowvram.few_layers import LAYERS, few_layers
from tests.lowvram.streams.mutations import Mutation

STEPS = 4
BF16, FP32 = torch.bfloat16, torch.float32
APART = ParallelLayout(vae_rank=True)  # the DiT's rank alone is soon run
SHARED = ParallelLayout(num_gpus_dit=2, ulysses_size=2, vae_rank=True)
LETS_GO = Mutation(
    "lowvram/offload/layers.py",
    "            unbind(self._dit, [spec.name for spec in self._component.slab_specs(layer_slab(index))])\n",
    "            pass\n",
    "parameters keep the slots of before",
)
DROPS = Mutation(
    "lowvram/offload/layers.py",
    "        self._prefetcher = Prefetcher(self._engine, [])\n        # Streamed",
    "        # Streamed",
    "slots of before stay until the new ones are there",
)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Precision -> an artifact."""
    return functools.partial(few_layers, tmp_path_factory.mktemp("few"))


def run(artifact, dtype: torch.dtype, monkeypatch, layout: ParallelLayout = APART) -> DryRun:
    """Two blocks on a card of the planned size. When both are under way, somebody else takes all of it that is free but
    for a part of what a pass works in: what is lacking is less than KV rings hold, and less than slots do."""
    work = Workload.of_size("256*192", infer_frames=24, sample_steps=STEPS, dtype=dtype)
    planned = plan_team(
        artifact,
        work,
        layout,
        Machines(
            cards=[CARDS["rtx4090"]] * layout.world_size,
            vram_bytes=[22 * GIB] * layout.world_size,
            machines=[0] * layout.world_size,
            ram_bytes=[64 * GIB],
        ),
        PlanOptions(offload_model=True, kv="bf16"),
    ).ranks[0]
    assert len(planned.placement.streamed_layers) == LAYERS
    assert not planned.placement.host_rings
    real, calls, taken = Rollout.advance, itertools.count(), []

    def advance(self: Rollout, items) -> None:
        if next(calls) == 2:
            assert len(items) == 2
            gpu = self.engine._simulated
            works_in = planned.stage_peaks["denoise"] - planned.device.total
            lacking = min(planned.device.rings // 8, works_in // 2)
            gpu.empty_cache()  # what lies between tensors is nobody's to take
            left = gpu.memory.capacity - gpu.reserved
            taken.append(torch.empty(left - works_in + lacking, dtype=torch.uint8, device="meta"))
        real(self, items)

    monkeypatch.setattr(Rollout, "advance", advance)
    found = dry_run(artifact, planned, clips=1, capacity=planned.peak_vram_bytes, layout=layout)
    assert taken
    return found


@pytest.mark.parametrize(
    ("precision", "dtype", "layout"),
    [
        ("bf16", BF16, APART),
        ("int8", BF16, APART),
        ("fp8", BF16, APART),
        ("bf16", FP32, APART),
        ("fp32", BF16, APART),
        ("bf16", BF16, SHARED),
    ],
)
def test_the_run_goes_on(artifacts, monkeypatch, precision, dtype, layout):
    """Rings leave the device, a rung at a time, and slots are where they were."""
    found = run(artifacts(precision), dtype, monkeypatch, layout)
    cells = LAYERS * STEPS
    moved = [f"denoise: {cells * rung // 4} of {cells} KV rings are on the host now" for rung in range(1, 5)]
    assert found.given_up
    assert list(found.given_up) == moved[: len(found.given_up)]


@pytest.mark.parametrize("mutation", [LETS_GO, DROPS], ids=str)
def test_slots_that_stay_would_leave_no_room_for_the_new_ones(artifacts, monkeypatch, mutation):
    with mutation.made(), pytest.raises(OutOfMemoryError, match="nothing is left"):
        run(artifacts("bf16"), BF16, monkeypatch)
