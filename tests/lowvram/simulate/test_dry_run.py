"""The runtime itself over the full 14B, without a GPU: its memory and its copies are those of the plan."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest

from lowvram.planning import CARDS, Workload, plan
from lowvram.planning.members import Machines
from lowvram.planning.planner import plan_team
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.simulate.dry_run import dry_run, dry_run_team, generation_of
from lowvram_quantize.format import Artifact
from lowvram_quantize.shape_artifact import write_shape_artifact

GIB = 1 << 30
HAS_TRITON = importlib.util.find_spec("triton") is not None
CASES = [
    # precision, size, budget, frames a clip (half of the usual where that says as much, in half of the time), whether
    # Triton's kernels run; the largest of each kind: whatever fits a card of 22.15 GiB fits a larger one
    ("int8", "704*384", 22.15, 48, True),
    ("int8", "720*400", 22.15, 24, True),
    ("int8", "384*256", 12.0, 24, True),
    ("int8", "384*256", 12.0, 12, False),
    ("bf16", "720*400", 22.15, 24, True),
]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    root = tmp_path_factory.mktemp("artifacts")
    return {name: Artifact.open(write_shape_artifact(root / name, precision=name)) for name in ("int8", "bf16")}


def kernels_of(wanted: bool, generation: int = 89) -> str:
    """What a dry run says that it ran."""
    if not wanted:
        return "torch (LOWVRAM_TRITON=0)"
    if generation < 80:
        return f"torch (sm_{generation} is older than sm_80)"
    return "triton" if HAS_TRITON else "torch (triton is not installed)"


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "size", "budget_gib", "frames", "wanted"), CASES)
def test_the_full_model_fits_as_planned(artifacts, precision, size, budget_gib, frames, wanted, monkeypatch):
    monkeypatch.setenv("LOWVRAM_TRITON", "1" if wanted else "0")
    budget = int(budget_gib * GIB)
    planned = plan(
        artifacts[precision],
        Workload.of_size(size, infer_frames=frames),
        vram_bytes=budget,
        ram_bytes=64 * GIB,
        card=CARDS["rtx4090"],
    )
    run = dry_run(artifacts[precision], planned, capacity=budget)
    assert run.kernels == kernels_of(wanted)
    assert run.given_up == ()
    assert run.peak_reserved <= budget
    assert run.peak_allocated + planned.reserve_bytes == pytest.approx(planned.peak_vram_bytes, rel=0.03)
    for stage in ("denoise", "decode"):
        assert run.stages[stage] == pytest.approx(planned.stage_peaks[stage], rel=0.03), stage
    for stage, peak in planned.stage_peaks.items():
        # An upper bound for the others: they are planned for prompts and voices of any length.
        assert run.stages[stage] <= peak + planned.reserve_bytes, stage
    if planned.placement.wave == 1:
        assert run.block_in == pytest.approx(planned.traffic.h2d, rel=0.03)
        assert run.block_out == pytest.approx(planned.traffic.d2h, rel=0.03)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Artifacts of the tiny model by precision, and plans for an RTX 4090 of another generation."""
    root = tmp_path_factory.mktemp("small")

    def planned(precision: str, **card):
        path = root / precision
        if not path.exists():
            write_shape_artifact(path, preset="tiny", precision=precision)
        artifact = Artifact.open(path)
        work = Workload.of_size("128*128", infer_frames=12, sample_steps=2)
        like = dataclasses.replace(CARDS["rtx4090"], **card)
        return artifact, plan(artifact, work, vram_bytes=2 * GIB, ram_bytes=64 * GIB, card=like)

    return planned


@pytest.mark.parametrize(
    ("precision", "generation"),
    [("int8", 75), ("int8", 80), ("int8", 120), ("fp8", 75), ("fp8", 86), ("fp8", 89), ("fp8", 90), ("bf16", 90)],
)
def test_every_precision_runs_on_every_generation(small, precision, generation, monkeypatch):
    monkeypatch.delenv("LOWVRAM_TRITON", raising=False)
    artifact, planned = small(precision, generation=generation)
    run = dry_run(artifact, planned)
    assert run.kernels == kernels_of(True, generation)
    assert run.given_up == ()
    assert 0 < run.stages["denoise"] <= planned.stage_peaks["denoise"] + planned.reserve_bytes


def test_a_card_that_does_not_say_its_generation_has_that_of_its_rates():
    card = dataclasses.replace(CARDS["rtx3090"], generation=None)
    rates = dataclasses.replace(card.rates, generation=None)
    assert generation_of(card) == 86
    assert generation_of(dataclasses.replace(card, rates=rates)) == 86
    assert generation_of(dataclasses.replace(card, rates=dataclasses.replace(rates, fp8=1e15))) == 89
    assert generation_of(CARDS["rtx5090"]) == 120


def test_a_device_smaller_than_the_plan_is_met_by_giving_way(artifacts):
    """Planned for 22.15 GiB, run on 20: the rest of the way is found while running."""
    artifact = artifacts["int8"]
    planned = plan(
        artifact,
        Workload.of_size("704*384", infer_frames=12),
        vram_bytes=int(22.15 * GIB),
        ram_bytes=64 * GIB,
        card=CARDS["rtx4090"],
    )
    run = dry_run(artifact, planned, clips=1, capacity=19 * GIB)
    assert run.given_up
    assert run.peak_reserved <= 19 * GIB


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        ("704*384", ParallelLayout(num_gpus_dit=3, ulysses_size=3, vae_rank=True)),
        ("720*400", ParallelLayout(num_gpus_dit=4, ulysses_size=1, vae_rank=True)),
    ],
)
def test_every_rank_of_several_fits_as_planned(artifacts, size, layout):
    count, budget = layout.world_size, int(22.15 * GIB)
    team = plan_team(
        artifacts["int8"],
        Workload.of_size(size, infer_frames=24),
        layout,
        Machines(
            cards=[CARDS["rtx4090"]] * count,
            vram_bytes=[budget] * count,
            machines=[0] * count,
            ram_bytes=[64 * GIB],
        ),
    )
    assert team.host[0].peak <= 64 * GIB
    runs = dry_run_team(artifacts["int8"], team)
    assert len(runs) == count
    for planned, run in zip(team.ranks, runs, strict=True):
        assert run.given_up == ()
        assert run.peak_reserved <= budget
        for stage in {"denoise", "decode"} & set(planned.stage_peaks):
            assert run.stages[stage] == pytest.approx(planned.stage_peaks[stage], rel=0.03), (planned.share, stage)
        assert set(run.stages) == set(planned.stage_peaks)
        if planned.share.denoises and planned.placement.wave == 1:
            assert run.block_in == pytest.approx(planned.traffic.h2d, rel=0.03)
            assert bool(run.sent) == (layout.ulysses_size > 1)
