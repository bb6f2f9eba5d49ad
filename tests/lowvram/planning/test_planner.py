"""Plans of several ranks: each within its card, the host counted once, and refusals that name who has too little."""

from __future__ import annotations

import itertools

import pytest

from lowvram.planning import CARDS, DoesNotFit, Machines, PlanOptions, Workload, plan_team
from lowvram.planning.memory import HOST_BASE_BYTES, pinned_weights
from lowvram.planning.memory_costs import GIB
from lowvram.planning.rank_layout import ParallelLayout, layouts
from lowvram.planning.timing import LINK_BYTES_PER_S, Seconds, slowest
from lowvram_kernels.errors import ConfigError, OutOfMemoryError

CARD = CARDS["rtx4090"]
WORK = Workload.of_size("704*384")
THREE_AND_VAE = ParallelLayout(num_gpus_dit=3, ulysses_size=3, vae_rank=True)
FOUR_AND_VAE = ParallelLayout(num_gpus_dit=4, ulysses_size=4, vae_rank=True)


def team(
    sizes, layout, work=WORK, *, gib=22.15, ram_gib=64.0, machines=None, link_bytes_per_s=LINK_BYTES_PER_S, **asked
):
    """All ranks on cards of ``gib`` (a number, or one a rank) GiB, on one machine or on ``machines``."""
    ranks = layout.world_size
    each = [gib] * ranks if isinstance(gib, (int, float)) else gib
    rams = [ram_gib] if isinstance(ram_gib, (int, float)) else ram_gib
    return plan_team(
        sizes,
        work,
        layout,
        Machines(
            cards=[CARD] * ranks,
            vram_bytes=[int(value * GIB) for value in each],
            machines=machines or [0] * ranks,
            ram_bytes=[int(value * GIB) for value in rams],
        ),
        PlanOptions(**asked),
        link_bytes_per_s=link_bytes_per_s,
    )


@pytest.mark.parametrize("size", ["704*384", "720*400"])
@pytest.mark.parametrize("gpus", [2, 3, 4, 5, 8])
def test_24_gb_cards_share_the_work_in_every_layout(sizes, size, gpus):
    model, work = sizes("int8"), Workload.of_size(size)
    alone = team(model, ParallelLayout(), work).seconds_per_block
    for layout in layouts(gpus, sample_steps=4, heads=40):
        found = team(model, layout, work)
        for rank in found.ranks:
            assert rank.peak_vram_bytes <= rank.vram_budget_bytes
            assert rank.fits
        assert found.host[0].peak <= 64 * GIB
        assert found.seconds_per_block < alone


def test_what_a_rank_does_not_do_takes_nothing_of_it(sizes):
    found = team(sizes("int8"), THREE_AND_VAE)
    for rank in found.ranks[:3]:
        assert set(rank.stage_peaks) == {"load_dit", "prefill_sink", "denoise"}
        assert rank.device.vae == rank.device.decoder_cache == rank.host.pinned_cache == 0
        assert rank.seconds.decode == 0
    vae = found.ranks[3]
    assert set(vae.stage_peaks) == {"encode_text", "encode_audio", "encode_image", "decode"}
    assert vae.device.total == vae.device.vae + vae.device.decoder_cache
    assert (vae.seconds.arithmetic, vae.rings, vae.weight_bytes, vae.kv_ring_bytes) == (0, 0, 0, 0)
    assert (vae.placement.streamed_layers, vae.placement.host_rings) == ((), ())


def test_without_a_rank_of_its_own_the_vae_is_with_the_first_of_the_last_stage(sizes):
    found = team(sizes("int8"), ParallelLayout(num_gpus_dit=4, ulysses_size=2))
    assert ["decode" in rank.stage_peaks for rank in found.ranks] == [False, False, True, False]
    assert found.parts["stage 1"].decode > 0
    assert found.limited_by.startswith("stage 1: ")


def test_rings_on_the_host_are_of_the_ranks_own_steps(sizes):
    found = team(sizes("int8"), ParallelLayout(num_gpus_dit=3), offload_kv_cache=True)
    for rank in found.ranks:
        steps = set(rank.share.steps)
        assert len(rank.placement.host_rings) == 40 * len(steps) == rank.rings
        assert {step for step, _ in rank.placement.host_rings} == steps


@pytest.mark.parametrize("gib", [7, 9, 12, 16, 22.15, (22.15, 9, 12, 16, 8), (9, 48, 9, 48, 22.15)])
def test_ranks_of_a_stage_have_the_same_wave(sizes, gib):
    for precision, layout in itertools.product(("int8", "bf16"), layouts(5, sample_steps=4, heads=40)):
        found = team(sizes(precision), layout, gib=gib, ram_gib=120)
        for stage in range(layout.stages):
            waves = {found.ranks[rank].placement.wave for rank in layout.members(stage)}
            assert len(waves) == 1
            assert waves.pop() <= len(layout.steps(stage, 4))


def test_weights_that_ranks_stream_lie_on_the_host_once(sizes):
    model = sizes("bf16")
    found = team(model, FOUR_AND_VAE, offload_model=True)
    (host,) = found.host
    once = pinned_weights(model, range(40))
    assert [rank.host.pinned_weights for rank in found.ranks] == [once] * 4 + [0]
    assert host.pinned_weights == once
    assert host.base == 5 * HOST_BASE_BYTES
    assert host.pinned_rings == sum(rank.host.pinned_rings for rank in found.ranks)
    assert host.peak == host.base + once + host.pinned_rings + found.ranks[4].host.pinned_cache
    different = team(model, FOUR_AND_VAE, gib=(22.15, 30, 40, 40, 22.15))
    union = {layer for rank in different.ranks for layer in rank.placement.streamed_layers}
    assert different.host[0].pinned_weights == pinned_weights(model, union)
    assert len({rank.placement.streamed_layers for rank in different.ranks}) > 1


def test_each_machine_has_its_own_copy(sizes):
    model = sizes("bf16")
    found = team(model, ParallelLayout(num_gpus_dit=4, ulysses_size=2), machines=[0, 0, 1, 1], ram_gib=(64, 64))
    for machine, ranks in ((0, found.ranks[:2]), (1, found.ranks[2:])):
        streamed = {layer for rank in ranks for layer in rank.placement.streamed_layers}
        assert found.host[machine].pinned_weights == pinned_weights(model, streamed) > 0
        assert found.host[machine].base == 2 * HOST_BASE_BYTES


def test_the_text_encoder_on_the_host_stands_beside_what_others_have_pinned(sizes):
    model = sizes("bf16")
    found = team(model, ParallelLayout(num_gpus_dit=2, vae_rank=True), gib=(22.15, 22.15, 8), ram_gib=120)
    host = found.host[0]
    assert [rank.text_encoder_device for rank in found.ranks] == ["", "", "cpu"]
    assert host.text_encoder == pytest.approx(2 * model.text_bytes, rel=1e-4)  # float32 there
    assert host.beside_text == host.pinned_weights + host.pinned_rings
    assert host.peak == host.base + host.text_encoder + host.beside_text > host.base + host.pinned


def test_a_host_with_little_memory_is_met_by_streaming_the_same_layers(sizes):
    layout = ParallelLayout(num_gpus_dit=3, ulysses_size=3, vae_rank=True)
    rich, poor = (team(sizes("int8"), layout, gib=12, ram_gib=ram) for ram in (96, 30))
    assert rich.host[0].peak > 30 * GIB >= poor.host[0].peak
    assert poor.host[0].pinned_rings < rich.host[0].pinned_rings
    assert poor.seconds_per_block >= rich.seconds_per_block
    assert all(rank.fits for rank in poor.ranks)


def test_a_card_that_is_too_small_is_refused_by_its_ranks_name(sizes):
    message = (
        r"does not fit on rank 1 \(stage 0, part 1\): 2\.\d\d GiB of device memory needed at the least \(\w+\), "
        r"2\.00 GiB there; .*would"
    )
    with pytest.raises(DoesNotFit, match=message) as info:
        team(sizes("int8"), THREE_AND_VAE, gib=(22.15, 2, 22.15, 22.15))
    assert info.value.plan.share.role.rank == 1
    assert [rank.fits for rank in info.value.ranks] == [True, False, True, True]
    with pytest.raises(DoesNotFit, match=r"on rank 3 \(VAE\): 2\.\d\d GiB"):
        team(sizes("int8"), THREE_AND_VAE, gib=(22.15, 22.15, 22.15, 2.6))


def test_advice_is_for_all_ranks(sizes):
    cards, large = (3.5, 22.15, 22.15, 6), Workload.of_size("1280*720")
    with pytest.raises(DoesNotFit, match=r'size "\d+\*\d+" would fit') as info:
        team(sizes("int8"), THREE_AND_VAE, large, gib=cards)
    size = str(info.value).split('size "')[1].split('"')[0]
    assert team(sizes("int8"), THREE_AND_VAE, Workload.of_size(size), gib=cards)


def test_a_host_that_is_too_small_is_refused_by_its_machines_name(sizes):
    with pytest.raises(OutOfMemoryError, match=r"on machine 1: .* host memory needed .* ranks 2, 3 together, 5\.00"):
        team(sizes("bf16"), ParallelLayout(num_gpus_dit=4, ulysses_size=2), machines=[0, 0, 1, 1], ram_gib=(96, 5))


def test_stages_work_at_once_and_a_vaes_rank_decodes_beside_them(sizes):
    found = team(sizes("int8"), ParallelLayout(num_gpus_dit=3, vae_rank=True))
    assert [list(rank.share.steps) for rank in found.ranks] == [[0, 1], [2], [3], []]
    stages = [seconds.block for seconds in found.stages]
    assert found.seconds_per_block == max(stages)
    assert stages[0] == pytest.approx(2 * stages[1], rel=0.01)
    assert found.limited_by == "stage 0: arithmetic"
    # The first block goes through all of them.
    assert found.first_block_s == pytest.approx(sum(stages) + found.ranks[3].seconds.decode, rel=0.001)
    assert found.frames_per_s == pytest.approx(12 / found.seconds_per_block)


def test_pipelines_shorten_a_block_and_ulysses_also_the_first(sizes):
    stages, tokens = (
        team(sizes("int8"), ParallelLayout(num_gpus_dit=4, ulysses_size=size, vae_rank=True)) for size in (1, 4)
    )
    assert stages.seconds_per_block < tokens.seconds_per_block
    assert tokens.first_block_s < stages.first_block_s


def test_what_is_exchanged_is_waited_for_and_is_in_the_way_of_copies(sizes):
    slow, fast = (team(sizes("int8"), THREE_AND_VAE, link_bytes_per_s=rate) for rate in (LINK_BYTES_PER_S, 2e11))
    bytes_ = slow.ranks[0].traffic
    assert slow.ranks[0].seconds.exchange == max(bytes_.sent, bytes_.received) / LINK_BYTES_PER_S
    assert slow.seconds_per_block > fast.seconds_per_block
    assert slow.ranks[0].seconds.pcie > fast.ranks[0].seconds.pcie
    assert any("exchange heads at 10 GB/s each way, as is assumed" in note for note in slow.notes)
    assert any("exchange heads at 200 GB/s each way" in note for note in fast.notes)
    crawling = team(sizes("int8"), THREE_AND_VAE, link_bytes_per_s=1e9)
    assert crawling.limited_by in ("stage 0: exchange", "stage 0: pcie")


def test_ranks_that_wait_for_each_other_take_as_long_as_the_slowest():
    a = Seconds(arithmetic=2, pcie=1, exposed=0.1, decode=0, exchange=0.2)
    b = Seconds(arithmetic=1, pcie=3, exposed=0, decode=0.5, exchange=0.3)
    assert slowest([a, b]) == Seconds(arithmetic=2, pcie=3, exposed=0.1, decode=0.5, exchange=0.3)


def test_the_same_is_planned_from_the_same(sizes):
    budgets = (22.15, 12, 16, 9)
    one, other = (team(sizes("bf16"), THREE_AND_VAE, gib=budgets, ram_gib=70) for _ in range(2))
    assert one == other


def test_a_wave_that_a_stage_is_too_short_for_is_said(sizes):
    found = team(sizes("int8"), ParallelLayout(num_gpus_dit=3), wave=2)
    assert [rank.placement.wave for rank in found.ranks] == [2, 1, 1]
    assert not any("were asked for" in note for note in found.notes)
    found = team(sizes("int8"), ParallelLayout(num_gpus_dit=4), wave=2)
    assert any("though 2 were asked for" in note for note in found.notes)
    with pytest.raises(ConfigError, match="--wave is 5"):
        team(sizes("int8"), ParallelLayout(num_gpus_dit=4), wave=5)


def test_what_does_not_describe_the_ranks_is_refused(sizes):
    with pytest.raises(ConfigError, match="5 stages for 4 denoising steps"):
        team(sizes("int8"), ParallelLayout(num_gpus_dit=5))
    with pytest.raises(ConfigError, match=r"machines \[0\], but memory is given of 2"):
        team(sizes("int8"), ParallelLayout(num_gpus_dit=2), ram_gib=(64, 64))
    two = dict(cards=[CARD], vram_bytes=[GIB] * 2, machines=[0, 0], ram_bytes=[64 * GIB])
    with pytest.raises(ConfigError, match="1 cards for 2 for the DiT"):
        plan_team(sizes("int8"), WORK, ParallelLayout(num_gpus_dit=2), Machines(**two))


def test_the_summary_is_a_line_with_the_figures(sizes):
    said = team(sizes("int8"), THREE_AND_VAE).summary()
    assert "\n" not in said
    for words in ("4 ranks", "3 for the DiT (1 stage x 3), 1 for the VAE", "of 64.00 GiB", "s a block (stage 0: "):
        assert words in said
    vae = team(sizes("int8"), THREE_AND_VAE).ranks[3].summary()
    assert "layers" not in vae


@pytest.mark.parametrize(("wave", "calls"), [(1, 4), (2, 7), (3, 9), (4, 10)])
def test_blocks_that_follow_the_first_join_its_passes(sizes, wave, calls):
    """In 4 steps 1, 2, ... blocks share a pass, up to the wave: the first frames wait for all of them."""
    found = team(sizes("int8"), ParallelLayout(), Workload.of_size("384*256"), wave=wave, gib=23)
    (alone,) = found.ranks
    seconds = alone.seconds
    assert not alone.placement.streamed_layers
    waited = seconds.arithmetic * calls / 4 + seconds.exposed + seconds.decode
    assert found.first_block_s == pytest.approx(waited)
