from __future__ import annotations

import pytest

from lowvram.planning import Workload
from lowvram.planning.memory_costs import kv_bytes, ring_costs, sink_bytes, step_exchange, step_operations
from lowvram.planning.rank_layout import (
    LayoutOptions,
    ParallelLayout,
    Role,
    chosen_layout,
    layouts,
    share_of,
    shares,
    span,
    whole,
)
from lowvram_kernels.errors import ConfigError


@pytest.mark.parametrize(
    ("total", "parts", "expected"),
    [(40, 3, (14, 13, 13)), (3375, 2, (1688, 1687)), (4, 4, (1, 1, 1, 1)), (5, 4, (2, 1, 1, 1)), (2, 3, (1, 1, 0))],
)
def test_shares(total, parts, expected):
    assert shares(total, parts) == expected
    spans = [span(total, parts, part) for part in range(parts)]
    assert [len(part) for part in spans] == list(expected)
    assert [index for part in spans for index in part] == list(range(total))


def test_roles_of_two_stages_of_three_and_a_vae():
    layout = ParallelLayout(num_gpus_dit=6, ulysses_size=3, vae_rank=True)
    assert (layout.stages, layout.world_size, layout.media_rank) == (2, 7, 6)
    assert layout.role(4) == Role(rank=4, stage=1, index=1, media=False)
    assert layout.role(6) == Role(rank=6, stage=None, index=None, media=True)
    assert not layout.role(6).denoises
    assert [role.rank for role in layout.roles() if role.media] == [6]
    assert [list(layout.members(stage)) for stage in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert [list(layout.steps(stage, 5)) for stage in range(2)] == [[0, 1, 2], [3, 4]]
    assert layout.role(4).name == "rank 4 (stage 1, part 1)"
    assert layout.role(6).name == "rank 6 (VAE)"
    assert layout.words() == "6 for the DiT (2 stages x 3), 1 for the VAE"


def test_without_a_rank_for_the_vae_latents_end_at_the_first_rank_of_the_last_stage():
    layout = ParallelLayout(num_gpus_dit=6, ulysses_size=2)
    assert layout.media_rank == 4
    assert layout.role(4) == Role(rank=4, stage=2, index=0, media=True)
    assert [role.rank for role in layout.roles() if role.media] == [4]


def test_one_rank_does_everything():
    layout = ParallelLayout()
    assert layout.roles() == [Role(rank=0, stage=0, index=0, media=True)]
    assert list(layout.steps(0, 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_every_step_is_some_stage_s(stages):
    layout = ParallelLayout(num_gpus_dit=stages)
    assert [step for stage in range(stages) for step in layout.steps(stage, 4)] == [0, 1, 2, 3]
    assert all(len(layout.steps(stage, 4)) for stage in range(stages))


@pytest.mark.parametrize(
    ("gpus", "dit", "ulysses", "vae"),
    [(1, 1, 1, False), (2, 2, 1, False), (3, 3, 3, False), (4, 3, 3, True), (5, 4, 1, True), (9, 8, 2, True)],
)
def test_defaults(gpus, dit, ulysses, vae):
    found = chosen_layout(gpus, sample_steps=4, heads=40)
    assert found == ParallelLayout(num_gpus_dit=dit, ulysses_size=ulysses, vae_rank=vae)


def test_what_is_given_is_kept():
    chosen = {"sample_steps": 4, "heads": 40}
    assert chosen_layout(5, LayoutOptions(num_gpus_dit=4, ulysses_size=4), **chosen).stages == 1
    assert chosen_layout(4, LayoutOptions(num_gpus_dit=4), **chosen) == ParallelLayout(num_gpus_dit=4)
    assert chosen_layout(4, LayoutOptions(enable_vae_parallel=False), **chosen) == ParallelLayout(num_gpus_dit=4)
    assert chosen_layout(3, LayoutOptions(enable_vae_parallel=True), **chosen) == ParallelLayout(
        num_gpus_dit=2, vae_rank=True
    )
    assert chosen_layout(2, LayoutOptions(num_gpus_dit=1), **chosen) == ParallelLayout(vae_rank=True)


def test_every_layout_of_four_gpus():
    found = [(layout.stages, layout.ulysses_size, layout.vae_rank) for layout in layouts(4, sample_steps=4, heads=40)]
    assert found == [(4, 1, False), (2, 2, False), (1, 4, False), (3, 1, True), (1, 3, True)]
    few = [(layout.stages, layout.ulysses_size) for layout in layouts(4, sample_steps=2, heads=3)]
    assert few == [(2, 2), (1, 3)]


@pytest.mark.parametrize(
    ("gpus", "choice", "model", "words"),
    [
        (4, {"num_gpus_dit": 2}, {}, r"4 ranks were started, but --num_gpus_dit 2 are 2; .*--num_gpus_dit 4"),
        (
            4,
            {"num_gpus_dit": 4, "enable_vae_parallel": True},
            {},
            r"4 and one for the VAE \(--enable_vae_parallel\) are 5",
        ),
        (3, {"num_gpus_dit": 3, "ulysses_size": 2}, {}, "make no whole number of stages"),
        (
            8,
            {"enable_vae_parallel": False},
            {"sample_steps": 3, "heads": 3},
            "8 GPUs for the DiT make no layout of 3 steps",
        ),
    ],
)
def test_what_does_not_add_up_is_refused(gpus, choice, model, words):
    with pytest.raises(ConfigError, match=words):
        chosen_layout(gpus, LayoutOptions(**choice), **{"sample_steps": 4, "heads": 40} | model)


@pytest.mark.parametrize("values", [{"num_gpus_dit": 0}, {"num_gpus_dit": 3, "ulysses_size": 2}, {"ulysses_size": 0}])
def test_no_whole_number_of_stages(values):
    with pytest.raises(ConfigError, match="stages x ulysses_size"):
        ParallelLayout(**values)


def test_every_rank_has_something_to_do():
    four = ParallelLayout(num_gpus_dit=4)
    four.check(sample_steps=4, heads=1, tokens_per_frame=1)
    with pytest.raises(ConfigError, match=r"4 stages for 3 denoising steps; .* larger --ulysses_size"):
        four.check(sample_steps=3, heads=5, tokens_per_frame=64)
    wide = ParallelLayout(num_gpus_dit=6, ulysses_size=6)
    with pytest.raises(ConfigError, match="--ulysses_size is 6 for 5 heads and 64 tokens"):
        wide.check(sample_steps=4, heads=5, tokens_per_frame=64)
    with pytest.raises(ConfigError, match="40 heads and 4 tokens"):
        wide.check(sample_steps=4, heads=40, tokens_per_frame=4)


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
    # Scales of keys, their mean and the values' scales; 25 tiles of values with their sums, the last half full.
    assert block.scales == 3168 * 13 * 2 + 2 * 13 * 128 * 2 + 13 * 128 * (25 * 2 + 25 * 128 - 3168)
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
