"""Shares of several ranks, counted by hand, and that nothing is lost or counted twice between them."""

from __future__ import annotations

import pytest

from lowvram.planning import Workload
from lowvram.planning.memory_costs import kv_bytes, ring_costs, sink_bytes, step_exchange, step_operations
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.planning.share import share_of, whole

THREE = ParallelLayout(num_gpus_dit=3, ulysses_size=3)
TWO = ParallelLayout(num_gpus_dit=2, ulysses_size=2)
LAYOUTS = [THREE, TWO, ParallelLayout(num_gpus_dit=3), ParallelLayout(num_gpus_dit=4, ulysses_size=2, vae_rank=True)]


def every_share(config, work, layout):
    return [share_of(config, work, layout, rank) for rank in range(layout.world_size)]


def test_40_heads_over_3_and_1125_tokens_a_frame_over_2(sizes):
    config, work = sizes("int8").config, Workload.of_size("720*400")
    assert work.tokens_per_frame == 1125
    assert [share.heads for share in every_share(config, work, THREE)] == [14, 13, 13]
    assert [share.block_tokens for share in every_share(config, work, THREE)] == [3 * 375] * 3
    assert [share.block_tokens for share in every_share(config, work, TWO)] == [3 * 563, 3 * 562]
    # Two frames of 1,125 tokens, the older motion as 12 x 22 and 4 x 6 x 11: 2,778 in all.
    assert [share.sink_tokens for share in every_share(config, work, TWO)] == [1389, 1389]
    assert [share.sink_tokens for share in every_share(config, work, THREE)] == [926, 926, 926]


def test_steps_are_counted_from_a_blocks_first_and_the_vae_has_none(sizes):
    config, work = sizes("int8").config, Workload.of_size("704*384")
    layout = ParallelLayout(num_gpus_dit=3, vae_rank=True)
    found = every_share(config, work, layout)
    assert [list(share.steps) for share in found] == [[0, 1], [2], [3], []]
    assert [share.media for share in found] == [False, False, False, True]
    assert [share.denoises for share in found] == [True, True, True, False]
    operations = step_operations(config, work, found[3])
    assert (operations.linear, operations.attention, found[3].heads) == (0, 0, 0)


def test_one_rank_has_all_of_it(sizes):
    config, work = sizes("int8").config, Workload.of_size("704*384")
    share = whole(config, work)
    assert (list(share.steps), share.heads, share.block_tokens) == ([0, 1, 2, 3], 40, 3168)
    assert share.denoises
    assert share.media
    assert not share.exchanges
    assert step_exchange(config, work, share).sent == 0


@pytest.mark.parametrize("kv", ["plain", "int8"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=ParallelLayout.words)
@pytest.mark.parametrize("size", ["704*384", "720*400"])
def test_rings_of_all_ranks_are_the_whole_rings(sizes, size, layout, kv):
    config, work = sizes("int8").config, Workload.of_size(size)
    rings = [ring_costs(config, work, kv, share) for share in every_share(config, work, layout)]
    all_of_it = ring_costs(config, work, kv, whole(config, work))
    for name in ("payload", "scales", "cell"):
        together = sum(ring.cells * getattr(ring, name) for ring in rings)
        # Each of a cell's blocks is filled up to 16 bytes, on every rank.
        spare = sum(ring.cells * 15 * work.blocks_per_clip for ring in rings) if name == "cell" else 0
        assert 0 <= together - all_of_it.cells * getattr(all_of_it, name) <= spare


@pytest.mark.parametrize("kv", ["plain", "int8"])
def test_a_stage_has_the_sink_once_and_every_stage_has_it(sizes, kv):
    config, work = sizes("int8").config, Workload.of_size("720*400")
    all_of_it = sink_bytes(config, work, kv, whole(config, work))
    for layout, times in ((THREE, 1), (ParallelLayout(num_gpus_dit=4, ulysses_size=2), 2)):
        sinks = [sink_bytes(config, work, kv, share) for share in every_share(config, work, layout)]
        assert sum(sink.payload for sink in sinks) == times * all_of_it.payload
        assert sum(sink.scales for sink in sinks) == times * all_of_it.scales


def test_13_heads_of_int8_by_hand(sizes):
    config, work = sizes("int8").config, Workload.of_size("704*384")
    share = share_of(config, work, THREE, 1)
    block = kv_bytes(config, 3168, "int8", share.heads, 2)
    assert block.payload == 2 * 3168 * 13 * 128
    assert block.scales == 2 * 3168 * 13 * 2 + 13 * 128 * 2
    rings = ring_costs(config, work, "int8", share)
    assert (rings.cells, rings.payload) == (160, 4 * block.payload)


@pytest.mark.parametrize("layout", [THREE, TWO], ids=ParallelLayout.words)
def test_work_of_all_ranks_is_the_whole_work_but_for_the_text(sizes, layout):
    config, work = sizes("int8").config, Workload.of_size("720*400")
    each = [step_operations(config, work, share) for share in every_share(config, work, layout)]
    all_of_it = step_operations(config, work, whole(config, work))
    assert sum(found.attention for found in each) == all_of_it.attention
    text = 4 * config.text_len * config.dim**2 * config.num_layers
    voice = 2 * config.dim**2 * (2 * 15 + 2 * 3) * len(config.audio_inject_layers)
    again = (layout.ulysses_size - 1) * (text + voice)
    assert sum(found.linear for found in each) == all_of_it.linear + again


def test_bytes_that_two_equal_ranks_exchange_by_hand(sizes):
    config, work = sizes("int8").config, Workload.of_size("704*384")
    layers = 40 * 4 * 1584 * 5120 * 2 // 2  # q, k, v and the result; half of own tokens' values go away
    for rank in (0, 1):
        found = step_exchange(config, work, share_of(config, work, TWO, rank))
        assert found.sent == found.received == layers + 1584 * 64 * 4


@pytest.mark.parametrize("layout", [THREE, TWO, ParallelLayout(num_gpus_dit=7, ulysses_size=7)])
def test_whatever_is_sent_is_received(sizes, layout):
    config, work = sizes("int8").config, Workload.of_size("720*400")
    found = [step_exchange(config, work, share) for share in every_share(config, work, layout)]
    assert sum(each.sent for each in found) == sum(each.received for each in found)
