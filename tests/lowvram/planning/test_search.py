from __future__ import annotations

import itertools
from collections import Counter

import pytest

from lowvram.offload.placement import PlanOptions
from lowvram.planning import Workload
from lowvram.planning.search import Job, candidates, spread, spread_rings


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
