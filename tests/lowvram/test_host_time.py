"""How busy the host is with a step: ceilings, and that nothing in it waits for the device. Counted without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its launches cannot be counted")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def counts_module():
    sys.path.append(str(BENCHMARKS))
    import host_counts

    yield host_counts
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def counted(counts_module, tmp_path_factory):
    """Rings -> counts of a layer, a step and a block of the tiny model, once two clips are behind it."""
    from lowvram_quantize.shape_artifact import write_shape_artifact

    artifact = write_shape_artifact(tmp_path_factory.mktemp("shapes") / "tiny", preset="tiny", precision="int8")
    found = {}
    for kv in ("int8", "plain"):
        counting = counts_module.Counting()
        with counts_module.as_if_cuda(counting):
            found[kv] = counts_module.Host(artifact, kv, (8, 8), counting).count()
    return found


# (launches, dispatcher calls). The first step of a block is the largest: there what depends on its audio is made.
CEILINGS = {
    ("int8", "plain layer"): (19, 55),
    ("int8", "audio layer"): (34, 110),
    ("plain", "plain layer"): (30, 80),
    ("plain", "audio layer"): (45, 135),
}


@pytest.mark.parametrize(("kv", "kind"), CEILINGS)
def test_a_layer_asks_no_more_than_this(counted, kv, kind):
    found, (launches, calls) = counted[kv][kind], CEILINGS[kv, kind]
    assert 10 < found.launched <= launches, found.launches
    assert found.launched < found.dispatched <= calls


@pytest.mark.parametrize("kv", ["int8", "plain"])
def test_nothing_waits_for_the_device(counted, kv):
    assert not counted[kv]["step"].syncs
    assert not counted[kv]["block"].syncs
    assert counted[kv]["block"].launches["_to_copy"] > 0  # what is uploaded is seen


def test_what_waits_is_seen(counts_module):
    counting = counts_module.Counting()
    with counts_module.as_if_cuda(counting), counts_module.SimulatedDevice(), counting, counting.scope("here"):
        there = torch.zeros(3).to("meta")
        there.copy_(torch.ones(3), non_blocking=True)
        there.cpu()
        torch.tensor([1.0], device="meta")
        torch.equal(there, there)
        with pytest.raises(RuntimeError, match="asks for a value"):
            there[0].item()
        with pytest.raises(NotImplementedError):
            there[there > 0]
    assert counting.scopes["here"][0].syncs == {
        "blocking copy to the device": 1,
        "copy from memory that is not pinned": 1,
        "copy to the host": 1,
        "torch.tensor on the device": 1,
        "equal": 1,
        "_local_scalar_dense": 1,
        "index": 1,
    }
