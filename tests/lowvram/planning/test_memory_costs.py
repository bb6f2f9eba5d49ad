"""The table of memory and operations that was made by hand from the model's shapes, and the runtime's own formats."""

from __future__ import annotations

import pytest
import torch

from lowvram.denoise.kv_cache import RingShape
from lowvram.denoise.kv_format import kv_format
from lowvram.planning import Workload
from lowvram.planning.memory_costs import GIB, allocated, kv_bytes, ring_costs, sink_bytes, step_operations
from lowvram.planning.rank_layout import whole

# Size; GiB of the rings of 4 steps in bf16 and int8; GiB of the sink in bf16; TFLOP a step, linear and attention.
BY_HAND = [
    ("384*256", 14.1, 7.0, 0.7, 31, 6),
    ("704*384", 38.7, 19.3, 2.0, 82, 41),
    ("720*400", 41.2, 20.6, 2.1, 87, 46),
    ("1280*720", 131.8, 65.9, 6.8, 274, 466),
]


def agrees(value: float, printed: float, step: float) -> bool:
    """Within 1 %, or half a step of the last digit that was printed."""
    return abs(value - printed) <= max(0.01 * printed, step / 2)


@pytest.mark.parametrize(("size", "plain", "int8", "sink", "linear", "attention"), BY_HAND)
def test_it_agrees_with_the_table_made_by_hand(sizes, size, plain, int8, sink, linear, attention):
    config, work = sizes("int8").config, Workload.of_size(size)
    share = whole(config, work)
    for kv, printed in (("plain", plain), ("int8", int8)):
        rings = ring_costs(config, work, kv, share)
        assert agrees(rings.cells * rings.payload / GIB, printed, 0.1)
    assert agrees(sink_bytes(config, work, "plain", share).payload / GIB, sink, 0.1)
    operations = step_operations(config, work, share)
    assert agrees(operations.linear / 1e12, linear, 1)
    assert agrees(operations.attention / 1e12, attention, 1)


def test_weights_are_those_of_the_published_model(sizes):
    assert sizes("bf16").weight_bytes == pytest.approx(32.6e9, rel=0.01)
    assert sizes("bf16").parameters == sizes("int8").parameters == pytest.approx(16.3e9, rel=0.01)
    # 8 bit a parameter, and 8 more for the 0.34e9 that stay in bf16.
    kept = (sizes("int8").start.nbytes + sizes("int8").shared.nbytes) / 2
    assert sizes("int8").weight_bytes == pytest.approx(16.3e9 + kept, rel=0.002)
    assert sizes("bf16").text_bytes == pytest.approx(11.4e9, rel=0.01)
    assert sizes("bf16").vae_bytes == pytest.approx(0.25e9, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kv", ["plain", "int8"])
@pytest.mark.parametrize("tokens", [3168, 960, 128, 77, 1])
@pytest.mark.parametrize("heads", [40, 13])
def test_a_block_has_the_bytes_that_are_written(sizes, kv, tokens, heads, dtype):
    config = sizes("int8").config
    kind = kv_format(kv, heads, config.head_dim, dtype)
    costs = kv_bytes(config, tokens, kv, heads, dtype.itemsize)
    assert costs.payload + costs.scales == kind.nbytes(tokens)
    assert costs.block == -(-kind.nbytes(tokens) // 16) * 16


@pytest.mark.parametrize("size", ["384*256", "704*384", "720*400", "832*480", "1024*704", "1280*720"])
@pytest.mark.parametrize("heads", [40, 20, 13, 10])
def test_rings_take_at_most_two_hundredths_more_than_in_their_first_format(sizes, size, heads):
    """There values lay as keys do, with a scale a token. Blocks and the sink of a tiny model, which fill no tile of 128
    tokens, are another thing."""
    config, work = sizes("int8").config, Workload.of_size(size)
    tokens = [work.block_tokens] * 4 * work.blocks_per_clip + [work.sink_tokens]
    each = {count: kv_bytes(config, count, "int8", heads, 2) for count in set(tokens)}
    first = {count: 2 * count * heads * 128 + 4 * count * heads + 2 * heads * 128 for count in set(tokens)}
    assert each[work.block_tokens].block <= 1.02 * first[work.block_tokens]
    assert sum(each[count].block for count in tokens) <= 1.02 * sum(first[count] for count in tokens)


@pytest.mark.parametrize("frames", [48, 32, 12])
def test_a_ring_has_the_slots_that_the_runtime_gives_it(sizes, frames):
    work = Workload(latent_size=(48, 88), infer_frames=frames)
    shape = RingShape.of(work.frames_per_clip, 3, work.tokens_per_frame)
    assert len(shape.slots) == work.blocks_per_clip
    assert max(shape.slots) == work.block_tokens
    assert shape.capacity == work.ring_tokens
    config = sizes("int8").config
    ring = ring_costs(config, work, "int8", whole(config, work))
    assert ring.read + ring.written == ring.cell


def test_the_allocator_gives_large_tensors_segments_of_two_mib():
    assert [allocated(n) for n in (0, 1, 512, 513, 5 << 20, (10 << 20) + 1, 12 << 20)] == [
        0, 512, 512, 1024, 5 << 20, 12 << 20, 12 << 20,
    ]  # fmt: skip
