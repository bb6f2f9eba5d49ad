"""Plans for runs in float32, and for weights that are stored otherwise than they are computed in, against the runtime
itself on a simulated GPU of exactly the planned size."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import torch
from click.testing import CliRunner

from lowvram import runtime as runtime_module
from lowvram.cli import main
from lowvram.loading.encoders import load_text_encoder
from lowvram.offload.placement import PlanOptions
from lowvram.pipeline import AvatarPipeline
from lowvram.planning import CARDS, DoesNotFit, Workload, plan
from lowvram.planning.members import Machines
from lowvram.planning.memory import loading
from lowvram.planning.memory_costs import GIB, MIB
from lowvram.planning.model_sizes import model_sizes
from lowvram.planning.planner import plan_team
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.planning.rank_plan import Plan
from lowvram.simulate.device import SimulatedDevice
from lowvram.simulate.dry_run import DryRun, dry_run
from lowvram_kernels.errors import ConfigError, OutOfMemoryError
from lowvram_quantize import shape_artifact
from lowvram_quantize.format import Artifact
from lowvram_quantize.presets import PRESETS
from tests.lowvram.few_layers import LAYERS, few_layers

CARD, APART = CARDS["rtx4090"], ParallelLayout(vae_rank=True)
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Precision -> an artifact."""
    return functools.partial(few_layers, tmp_path_factory.mktemp("few"))


def work(dtype: torch.dtype, steps: int = 1) -> Workload:
    return Workload.of_size("256*192", infer_frames=12, sample_steps=steps, dtype=dtype)


def planned(artifact: Artifact, dtype: torch.dtype, nbytes: int = 40 * GIB, **asked) -> Plan:
    options = PlanOptions(**asked)
    return plan(artifact, work(dtype), options, vram_bytes=nbytes, ram_bytes=200 * GIB, card=CARD)


def planned_apart(artifact: Artifact, dtype: torch.dtype, nbytes: int = 40 * GIB, **asked) -> Plan:
    """Of a rank that denoises and does nothing else, which is soon run."""
    return planned_team(artifact, dtype, APART, nbytes, **asked)[0]


def planned_team(
    artifact: Artifact, dtype: torch.dtype, layout: ParallelLayout, nbytes: int, **asked
) -> tuple[Plan, ...]:
    count = layout.world_size
    team = plan_team(
        artifact,
        work(dtype),
        layout,
        Machines(cards=[CARD] * count, vram_bytes=[nbytes] * count, machines=[0] * count, ram_bytes=[200 * GIB]),
        PlanOptions(**asked),
    )
    return team.ranks


def assert_as_planned(found: Plan, run: DryRun) -> None:
    assert run.given_up == ()
    assert run.peak_reserved <= found.peak_vram_bytes
    for stage in {"denoise", "decode"} & set(found.stage_peaks):
        assert run.stages[stage] == pytest.approx(found.stage_peaks[stage], rel=0.03), stage
    for stage, peak in found.stage_peaks.items():
        assert run.stages[stage] <= peak + found.reserve_bytes, stage


AWAY = {"offload_model": True, "offload_kv_cache": True}
CASES = [
    # stored, computed in, asked
    ("int8", FP32, {}),
    ("int8", FP32, AWAY | {"kv": "bf16"}),
    ("fp8", FP32, {"offload_model": True}),
    ("bf16", FP32, {}),
    ("bf16", FP32, {"offload_model": True}),
    ("bf16", FP32, AWAY | {"kv": "int8"}),
    ("fp32", FP32, {"offload_model": True}),
    ("fp32", BF16, {}),
    ("fp32", BF16, AWAY),
]


@pytest.mark.parametrize(("precision", "dtype", "asked"), CASES)
def test_a_run_takes_what_is_planned(artifacts, precision, dtype, asked):
    artifact = artifacts(precision)
    found = planned_apart(artifact, dtype, **asked)
    assert (len(found.placement.streamed_layers) == LAYERS) == ("offload_model" in asked)
    assert_as_planned(found, dry_run(artifact, found, layout=APART, capacity=found.peak_vram_bytes))


@pytest.mark.parametrize(("precision", "asked"), [("int8", {}), ("bf16", {"offload_model": True})])
def test_so_does_a_run_with_encoders_and_vae(artifacts, precision, asked):
    artifact = artifacts(precision)
    found = planned(artifact, FP32, **asked)
    assert set(found.stage_peaks) == {
        "encode_text",
        "encode_audio",
        "encode_image",
        "load_dit",
        "prefill_sink",
        "denoise",
        "decode",
    }
    assert_as_planned(found, dry_run(artifact, found, capacity=found.peak_vram_bytes))


def test_layers_are_streamed_in_part_where_the_card_has_room_for_some(artifacts):
    artifact = artifacts("bf16")
    least, most = (planned_apart(artifact, FP32, **asked).peak_vram_bytes for asked in ({"offload_model": True}, {}))
    found = planned_apart(artifact, FP32, (least + most) // 2 + 512 * MIB)
    assert 0 < len(found.placement.streamed_layers) < LAYERS
    assert_as_planned(found, dry_run(artifact, found, layout=APART, capacity=found.peak_vram_bytes))


def test_ranks_that_exchange_in_float32_take_what_is_planned(artifacts):
    artifact, layout = artifacts("int8"), ParallelLayout(num_gpus_dit=2, ulysses_size=2, vae_rank=True)
    wide, narrow = (planned_team(artifact, dtype, layout, 40 * GIB) for dtype in (FP32, BF16))
    for found in wide[:2]:
        run = dry_run(artifact, found, layout=layout, capacity=found.peak_vram_bytes)
        assert_as_planned(found, run)
        assert run.sent > 2 * found.traffic.sent  # two blocks, and the sink
    assert wide[0].traffic.sent > 1.9 * narrow[0].traffic.sent


@pytest.mark.parametrize(("precision", "kv"), [("int8", "auto"), ("int8", "bf16"), ("fp8", "auto"), ("bf16", "auto")])
def test_what_does_not_fit_in_float32_is_refused_beforehand(artifacts, precision, kv):
    """In bfloat16 it would have done."""
    artifact = artifacts(precision)
    with pytest.raises(DoesNotFit) as refused:
        planned(artifact, FP32, GIB, kv=kv)
    needed = refused.value.plan.peak_vram_bytes
    assert planned(artifact, FP32, needed, kv=kv).peak_vram_bytes <= needed
    with pytest.raises(OutOfMemoryError, match="does not fit"):
        planned(artifact, FP32, needed - MIB, kv=kv)
    assert planned(artifact, BF16, needed - MIB, kv=kv).fits


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_and_rightly(artifacts, precision):
    """A card that is smaller by more than the reserve runs out of memory, whatever is given up."""
    artifact = artifacts(precision)
    least = min((planned_apart(artifact, FP32, **AWAY), planned_apart(artifact, FP32)), key=lambda p: p.peak_vram_bytes)
    capacity = int(0.95 * (least.peak_vram_bytes - least.reserve_bytes))
    with pytest.raises(DoesNotFit):
        planned_apart(artifact, FP32, capacity + least.reserve_bytes)
    with pytest.raises(OutOfMemoryError, match="nothing is left"):
        dry_run(artifact, least, layout=APART, capacity=capacity)


def test_slower_too(artifacts):
    plans = [planned(artifacts("bf16"), dtype) for dtype in (FP32, BF16)]
    wide, narrow = (found.seconds for found in plans)
    products = [[task.seconds("expected") for task in plan.tasks if "Linears" in task.name] for plan in plans]
    assert products[0] == [pytest.approx(seconds * CARD.rates.bf16 / CARD.rates.fp32) for seconds in products[1]]
    assert wide.arithmetic > narrow.arithmetic
    assert wide.decode > narrow.decode
    eight, plain = (planned(artifacts("int8"), FP32, kv=kv).seconds for kv in ("int8", "bf16"))
    assert eight.arithmetic < plain.arithmetic < wide.arithmetic


def test_rings_that_are_not_8_bit_are_float32(artifacts):
    wide, narrow = (planned(artifacts("int8"), dtype, kv="bf16") for dtype in (FP32, BF16))
    assert wide.kv_ring_bytes == 2 * narrow.kv_ring_bytes
    assert wide.sink_bytes == 2 * narrow.sink_bytes
    assert wide.weight_bytes == narrow.weight_bytes


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16", FP32), ("fp32", BF16), ("int8", FP32), ("fp8", FP32), ("nf4", FP32), ("bf16", BF16)],
)
def test_a_text_encoder_is_loaded_piece_by_piece(tmp_path, monkeypatch, precision, dtype):
    """What is stored in another dtype never stands on the device as a whole beside its copies."""
    sizes = {"vocab_size": 512, "d_model": 512, "d_ff": 1024, "num_heads": 8, "d_kv": 64, "num_layers": 8}
    monkeypatch.setitem(shape_artifact.PRESETS, "tiny", dataclasses.replace(PRESETS["tiny"], text_encoder=sizes))
    stored = "bf16" if precision == "nf4" else precision
    path = shape_artifact.write_shape_artifact(
        tmp_path / "few", preset="tiny", precision=stored, text_encoder=precision
    )
    artifact = Artifact.open(path)
    slabs = model_sizes(artifact).text
    with SimulatedDevice() as gpu:
        model = load_text_encoder(artifact, torch.device("meta"), dtype)
        assert gpu.peak_allocated == pytest.approx(loading(slabs, dtype), rel=0.03)
        assert gpu.allocated == pytest.approx(sum(slab.bound(dtype) for slab in slabs), rel=0.03)
        del model


@pytest.mark.parametrize(("given", "dtype"), [("auto", FP32), ("float32", FP32), ("bfloat16", BF16)])
def test_a_run_is_planned_for_what_it_computes_in(tiny, monkeypatch, given, dtype):
    """On a CPU, where nothing is planned, "auto" is float32."""
    asked: list[Workload] = []

    def decide(artifact, work, *_, **options) -> None:
        asked.append(work)
        raise ConfigError("that is enough")

    monkeypatch.setattr(runtime_module, "decide", decide)
    pipeline = AvatarPipeline.from_artifact(tiny.artifact("bf16"), device="cpu", dtype=given)
    with pytest.raises(ConfigError, match="enough"):
        next(pipeline.stream(tiny.request()))
    assert [found.dtype for found in asked] == [dtype]


PLAN = ["plan", "--preset", "tiny", "--size", "128*128", "--vram", "2GiB", "--ram", "16GiB", "--gpu", "rtx4090"]


@pytest.mark.parametrize(
    ("given", "dtype"),
    [([], "bfloat16"), (["auto"], "bfloat16"), (["bfloat16"], "bfloat16"), (["float32"], "float32")],
)
def test_the_command_says_what_is_computed_in(monkeypatch, given, dtype):
    monkeypatch.setenv("COLUMNS", "150")
    options = [*PLAN, "--precision", "bf16", *(f"--dtype={name}" for name in given)]
    table, as_json = (CliRunner().invoke(main, [*options, *more]) for more in ([], ["--json"]))
    told = json.loads(as_json.stdout)
    assert told["dtype"] == dtype
    assert any("float32" in note for note in told["notes"]) == (dtype == "float32")
    said = " ".join(table.stdout.split())
    assert f"computed in, what is not 8-bit │ {dtype}" in said
    assert f"KV rings, {'bf16' if dtype == 'bfloat16' else 'float32'} (" in said


def test_the_command_refuses_other_dtypes():
    result = CliRunner().invoke(main, [*PLAN, "--dtype", "float16"])
    assert result.exit_code == 2
    assert "--dtype is 'float16'; expected auto, float32 or bfloat16" in " ".join(result.stderr.split())
    with pytest.raises(ConfigError, match=r"torch\.float16 was to be computed in"):
        work(torch.float16)
