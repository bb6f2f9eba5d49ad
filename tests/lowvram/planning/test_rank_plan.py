from __future__ import annotations

import dataclasses
import random

import pytest

from lowvram.offload.placement import PlanOptions
from lowvram.planning import CARDS, DoesNotFit, Workload
from lowvram.planning.library_memory import SLACK_BYTES, OutsideAllocator
from lowvram.planning.memory_costs import GIB
from lowvram.planning.planner import plan
from lowvram.planning.workspace import decoder_cache
from lowvram_kernels.errors import ConfigError, OutOfMemoryError

CARD = CARDS["rtx4090"]
WORK = Workload.of_size("704*384")


def planned(sizes, gib: float, work: Workload = WORK, *, ram_gib: float = 96, card=CARD, **asked):
    options, vram = PlanOptions(**asked), int(gib * GIB)
    return plan(sizes, work, options, vram_bytes=vram, ram_bytes=int(ram_gib * GIB), card=card)


@pytest.mark.parametrize("precision", ["int8", "fp8", "bf16"])
@pytest.mark.parametrize("gib", [16, 20, 22.15, 30, 48, 78])
def test_every_usual_card_gets_a_plan(sizes, precision, gib):
    result = planned(sizes(precision), gib)
    assert result.fits
    assert result.peak_vram_bytes <= result.vram_budget_bytes
    assert result.peak_host_bytes <= result.ram_budget_bytes
    if result.placement.streamed_layers or result.placement.host_rings:
        assert result.peak_vram_bytes >= 0.95 * result.vram_budget_bytes


@pytest.mark.parametrize("size", ["704*384", "720*400"])
def test_24_gb_are_enough_with_weights_of_either_kind(sizes, size):
    work = Workload.of_size(size)
    assert planned(sizes("int8"), 22.15, work, ram_gib=48).fits
    assert planned(sizes("bf16"), 22.15, work, ram_gib=64, kv="bf16").fits


def test_12_gib_are_enough_for_a_small_picture(sizes):
    assert planned(sizes("int8"), 12, Workload.of_size("384*256"), ram_gib=32).fits


def test_host_memory_for_int8_is_under_48_gib_and_known_before(sizes):
    assert planned(sizes("int8"), 22.15).peak_host_bytes < 48 * GIB
    everything = planned(sizes("int8"), 22.15, offload_model=True, offload_kv_cache=True)
    assert everything.peak_host_bytes < 48 * GIB
    assert everything.host.pinned_weights >= sum(sizes("int8").layer_bytes)


@pytest.mark.parametrize(("precision", "scheme"), [("int8", "int8"), ("fp8", "int8"), ("bf16", "plain")])
def test_rings_are_kept_as_the_weights_suggest(sizes, precision, scheme):
    assert planned(sizes(precision), 30).placement.kv == scheme


def test_rings_are_kept_as_was_asked(sizes):
    plain = planned(sizes("int8"), 22.15, kv="bf16")
    int8 = planned(sizes("int8"), 22.15, kv="int8")
    assert plain.placement.kv == "plain"
    assert plain.kv_ring_bytes == 2 * int8.kv_ring_bytes
    assert (plain.kv_scale_bytes, plain.sink_scale_bytes) == (0, 0)
    assert 0.015 < int8.kv_scale_bytes / int8.kv_ring_bytes < 0.03


def test_weights_used_four_times_a_block_deserve_the_device_before_rings(sizes):
    result = planned(sizes("int8"), 22.15, wave=1)
    assert not result.placement.streamed_layers
    assert result.placement.host_rings


def test_waves_are_taken_where_weights_stream_and_not_where_they_do_not(sizes):
    assert planned(sizes("bf16"), 22.15).placement.wave == 4
    assert planned(sizes("int8"), 22.15).placement.wave == 1
    assert planned(sizes("int8"), 12, wave=2).placement.wave == 2


def test_a_wave_saves_traffic(sizes):
    alone, together = (planned(sizes("bf16"), 12, ram_gib=80, wave=wave) for wave in (1, 4))
    assert together.traffic.h2d < 0.6 * alone.traffic.h2d
    assert together.seconds_per_block < alone.seconds_per_block
    assert (alone.limited_by, together.limited_by) == ("pcie", "arithmetic")


def test_what_streams_is_what_crosses(sizes):
    result = planned(sizes("bf16"), 22.15, wave=3)
    weights = sum(sizes("bf16").layer_bytes[i] for i in result.placement.streamed_layers)
    block = 2 * WORK.block_tokens * 5120 * 2
    hosted = len(result.placement.host_rings)
    assert result.traffic.h2d == pytest.approx(weights * 4 / 3 + hosted * 3 * block, rel=1e-6)
    cache = decoder_cache(sizes("bf16").vae_base_dim, WORK)
    assert result.traffic.d2h == hosted * block + cache
    assert planned(sizes("int8"), 78).pcie_bytes_per_block == cache


def test_more_memory_is_never_slower(sizes):
    draw = random.Random(7)
    for precision in ("int8", "bf16"):
        for size in ("384*256", "1280*720"):
            budgets = sorted(draw.uniform(6, 80) for _ in range(12))
            seconds = []
            for gib in budgets:
                try:
                    seconds.append(
                        planned(sizes(precision), gib, Workload.of_size(size), ram_gib=400).seconds_per_block
                    )
                except DoesNotFit:
                    assert not seconds  # what fits in less fits in more
            assert seconds == sorted(seconds, reverse=True)


def test_invented_budgets_hold_and_are_used(sizes):
    draw = random.Random(11)
    for _ in range(60):
        work = Workload.of_size(
            draw.choice(["384*256", "704*384", "832*480", "1280*720"]),
            infer_frames=draw.choice([12, 32, 48, 80]),
            sample_steps=draw.choice([1, 2, 4]),
        )
        budget, model = draw.uniform(4, 90), sizes(draw.choice(["int8", "bf16"]))
        try:
            result = planned(model, budget, work, ram_gib=draw.uniform(16, 400), card=draw.choice(list(CARDS.values())))
        except DoesNotFit as refused:
            nearest = refused.plan
            assert not nearest.fits
            over_device = nearest.peak_vram_bytes > nearest.vram_budget_bytes
            assert over_device or nearest.peak_host_bytes > nearest.ram_budget_bytes
            continue
        assert result.fits
        assert result.peak_vram_bytes <= result.vram_budget_bytes
        assert result.peak_host_bytes <= result.ram_budget_bytes
        assert sum(dataclasses.asdict(result.device).values()) == result.device.total
        if result.placement.streamed_layers or result.placement.host_rings:
            assert result.peak_vram_bytes >= 0.95 * result.vram_budget_bytes


def test_a_card_that_is_too_small_is_refused_with_figures(sizes):
    with pytest.raises(
        OutOfMemoryError, match=r"5\.\d\d GiB of device memory needed.*\(decode\), 5\.00 GiB there"
    ) as info:
        planned(sizes("int8"), 5)
    assert info.value.plan.peak_vram_bytes > 5 * GIB
    assert 'size "512*320" would fit' in str(info.value)
    smaller = Workload.of_size("512*320")
    assert planned(sizes("int8"), 5, smaller).fits


def test_a_host_that_is_too_small_is_refused_with_figures(sizes):
    message = r"of host memory needed at the least beside 22\.15 GiB of device memory, 32\.00 GiB there; --kv int8 "
    with pytest.raises(OutOfMemoryError, match=message) as info:
        planned(sizes("bf16"), 22.15, ram_gib=32)
    assert info.value.plan.peak_host_bytes > 32 * GIB
    assert info.value.plan.peak_vram_bytes <= 22.15 * GIB


def test_where_nothing_would_fit_it_says_so(sizes):
    with pytest.raises(DoesNotFit, match="no smaller size would fit either"):
        planned(sizes("int8"), 2)


def test_the_text_encoder_goes_to_the_host_where_the_device_is_too_small(sizes):
    small, large = (planned(sizes("bf16"), gib, Workload.of_size("384*256")) for gib in (8, 22.15))
    assert (small.text_encoder_device, large.text_encoder_device) == ("cpu", "cuda")
    assert small.stage_peaks["encode_text"] == 0
    assert small.host.text_encoder == pytest.approx(2 * sizes("bf16").text_bytes, rel=1e-4)  # float32 there
    assert any("text encoder" in note for note in small.notes)
    assert large.stage_peaks["encode_text"] > 10 * GIB


def test_the_reserve_is_kept_free(sizes):
    outside = OutsideAllocator(context=0, cublas=GIB - SLACK_BYTES, modules=0, vae=())
    result = planned(sizes("int8"), 22.15, card=dataclasses.replace(CARDS["rtx4090"], outside=outside))
    assert result.peak_vram_bytes - max(result.stage_peaks.values()) == GIB
    assert max(result.stage_peaks.values()) <= 21.15 * GIB


def test_fp8_on_a_card_without_its_units_is_said(sizes):
    old, new = (planned(sizes("fp8"), 22.15, card=CARDS[name]) for name in ("rtx3090", "rtx4090"))
    assert any("no FP8 units" in note for note in old.notes)
    assert not any("no FP8 units" in note for note in new.notes)
    int8 = planned(sizes("int8"), 22.15, card=CARDS["rtx3090"])
    assert old.seconds.arithmetic > int8.seconds.arithmetic


def test_options_that_cannot_work_are_refused(sizes):
    with pytest.raises(ConfigError, match="--kv is 'fp4'"):
        planned(sizes("int8"), 22.15, kv="fp4")
    for wave in (0, 5, "all"):
        with pytest.raises(ConfigError, match="--wave is"):
            planned(sizes("int8"), 22.15, wave=wave)


def test_weights_in_float32_are_planned_as_they_are_bound(sizes):
    result = planned(sizes("fp32"), 78, ram_gib=200)
    assert result.weight_bytes == pytest.approx(2 * sizes("bf16").weight_bytes, rel=0.001)
    assert not result.placement.streamed_layers
    assert result.device.resident_layers == pytest.approx(sum(sizes("bf16").layer_bytes), rel=0.01)


@pytest.mark.parametrize(
    ("card", "gib", "size", "streamed", "hosted", "seconds"),
    [
        ("rtx3060", 11.0, "384*256", 20, 159, 3.1),
        ("rtx4080", 14.5, "704*384", 18, 155, 2.8),
        ("rtx4090", 22.15, "704*384", 0, 137, 1.7),
        ("rtx4090", 22.15, "720*400", 0, 140, 1.8),
        ("rtx5090", 30.0, "704*384", 0, 74, 1.3),
    ],
)
def test_one_card_is_planned_as_the_readme_says(sizes, card, gib, size, streamed, hosted, seconds):
    result = planned(sizes("int8"), gib, Workload.of_size(size), ram_gib=64, card=CARDS[card])
    assert (len(result.placement.streamed_layers), len(result.placement.host_rings)) == (streamed, hosted)
    assert result.seconds_per_block == pytest.approx(seconds, abs=0.05)


@pytest.mark.parametrize("precision", ["int8", "fp8", "bf16"])
def test_loading_takes_what_lies_there_when_all_is_loaded(sizes, precision):
    """Rings, slots and the VAE are there before the first block, and so is what only goes before it."""
    found = planned(sizes(precision), 78, ram_gib=200)
    start = sizes(precision).start.bound(found.workload.dtype)
    assert found.stage_peaks["load_dit"] >= found.device.total - found.device.decoder_cache + start
    assert found.stage_peaks["load_dit"] <= found.stage_peaks["denoise"]
