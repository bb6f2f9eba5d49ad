from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest

from lowvram.offload.placement import PlanOptions
from lowvram.planning import CARDS, Workload
from lowvram.planning.search import Job, candidates, fastest, least_placement, spread, spread_rings


@pytest.mark.parametrize("total", [1, 7, 40])
def test_indices_are_spread_evenly(total):
    for count in range(total + 1):
        chosen = spread(count, total)
        assert len(set(chosen)) == count
        assert list(chosen) == sorted(chosen)
        gaps = [b - a for a, b in itertools.pairwise(chosen)]
        assert not gaps or max(gaps) - min(gaps) <= 1
        # The way round, from the last to the first of the next pass, is no longer than the others by more than one.
        assert not gaps or chosen[0] + total - chosen[-1] <= max(gaps) + 1


@pytest.mark.parametrize(("steps", "layers"), [(4, 40), (3, 40), (1, 40), (4, 5)])
def test_rings_are_spread_evenly_over_layers_and_steps(steps, layers):
    for count in range(steps * layers + 1):
        cells = spread_rings(count, range(steps), layers)
        assert len(set(cells)) == count
        assert list(cells) == sorted(cells)
        by_step, by_layer = (Counter(cell[i] for cell in cells) for i in (0, 1))
        shares = [by_step[step] for step in range(steps)]
        assert max(shares) - min(shares) <= 1
        counts = [by_layer[layer] for layer in range(layers)]
        assert max(counts) - min(counts) <= 1


def test_each_candidate_has_the_fewest_host_rings_that_fit(sizes):
    job = Job(sizes=sizes("int8"), work=Workload.of_size("704*384"), kv="int8")
    budget = 20 * 2**30
    found = list(candidates(job, budget))
    assert len({(p.wave, len(p.streamed_layers)) for p in found}) == len(found)
    for placement in found[::7]:
        assert job.peak(placement) <= budget
        hosted = len(placement.host_rings)
        if hosted > 2:
            fewer = job.placement(len(placement.streamed_layers), hosted - 1, placement.wave)
            assert job.peak(fewer) > budget


def test_rings_that_have_to_be_on_the_host_are(sizes):
    job = Job(
        sizes=sizes("int8"),
        work=Workload.of_size("704*384"),
        kv="int8",
        options=PlanOptions(offload_kv_cache=True, offload_model=True),
    )
    for placement in candidates(job, 70 * 2**30):
        assert len(placement.host_rings) == 160
        assert len(placement.streamed_layers) == 40


def test_an_encoder_beyond_the_budget_leaves_nothing_to_divide(sizes):
    """No layer and no ring that goes makes room for it."""
    job = Job(sizes=sizes("bf16"), work=Workload.of_size("384*256"), kv="int8")
    assert job.stage_peaks(job.placement(40, job.cells, 1))["encode_text"] > 9 * 2**30
    assert list(candidates(job, 9 * 2**30)) == []
    beside = dataclasses.replace(job, text_device="cpu")
    assert list(candidates(beside, 9 * 2**30))


@pytest.mark.parametrize(
    ("layers", "steps", "streams", "rings"),
    [(40, 4, 40, 160), (1, 4, 0, 4), (40, 1, 40, 40), (1, 1, 0, 0)],
)
def test_what_has_less_than_its_slots_is_smaller_without_them(sizes, layers, steps, streams, rings):
    whole = sizes("int8")
    config = dataclasses.replace(whole.config, num_layers=layers, audio_inject_layers=())
    few = dataclasses.replace(whole, config=config, layers=whole.layers[:layers])
    job = Job(sizes=few, work=Workload.of_size("704*384", sample_steps=steps), kv="int8", text_device="cpu")
    least = least_placement(job)
    assert (len(least.streamed_layers), len(least.host_rings)) == (streams, rings)
    every = (job.placement(s, h, 1) for s in (0, layers) for h in (0, job.cells))
    assert job.peak(least) == min(map(job.peak, every))


def test_of_equally_fast_placements_the_smaller_wave_is_taken(sizes):
    """It shows its first frames sooner."""
    job = Job(sizes=sizes("int8"), work=Workload.of_size("384*256"), kv="int8")
    rates = CARDS["rtx4090"].rates
    waves = [job.placement(0, 0, wave) for wave in (3, 1, 4, 2)]
    assert len({job.seconds(placement, rates).block for placement in waves}) == 1
    assert fastest(job, rates, waves).wave == 1


def test_every_wave_up_to_the_steps_is_tried(sizes):
    job = Job(sizes=sizes("int8"), work=Workload.of_size("384*256"), kv="int8")
    assert {placement.wave for placement in candidates(job, 40 * 2**30)} == {1, 2, 3, 4}
