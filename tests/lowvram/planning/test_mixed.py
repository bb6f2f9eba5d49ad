"""Plans of mixed artifacts: bytes, operations, and what a run on a simulated GPU takes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner

from lowvram.cli import main
from lowvram.offload.placement import PlanOptions
from lowvram.planning import CARDS, Workload, plan
from lowvram.planning.memory_costs import GIB, rows_of, step_operations
from lowvram.planning.model_sizes import model_sizes
from lowvram.planning.rank_layout import whole
from lowvram.planning.timing import seconds_of
from lowvram.simulate.dry_run import dry_run
from tests.lowvram.few_layers import FEW, LAYERS, few_layers
from tests.lowvram.mixes import MIXES, apart
from tests.lowvram.planning.test_dtypes import APART, CARD, assert_as_planned, planned_apart

UNIFORM = ("int8", "fp8", "bf16")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Mix or precision -> an artifact."""
    folder = tmp_path_factory.mktemp("mixed")

    def artifact(name: str):
        if name in UNIFORM:
            return few_layers(folder, name)
        return few_layers(folder, "int8", name=name.replace(" ", "-"), apart=apart(FEW.dit, name))

    return artifact


@pytest.mark.parametrize("name", [*UNIFORM, *MIXES])
def test_operations_are_those_of_all_linears(artifacts, name):
    sizes, work = model_sizes(artifacts(name)), Workload.of_size("704*384")
    share = whole(sizes.config, work)
    rows = rows_of(sizes.config, work, share)
    assert (
        sum(2 * of.weights * rows[of.rows] for of in sizes.linears) == step_operations(sizes.config, work, share).linear
    )


@pytest.mark.parametrize("name", MIXES)
def test_seconds_and_bytes_lie_between_those_of_what_it_is_made_of(artifacts, name):
    card, work = CARDS["rtx4090"], Workload.of_size("704*384")
    sizes = {each: model_sizes(artifacts(each)) for each in ("int8", "bf16", name)}
    placement = plan(artifacts(name), work, vram_bytes=40 * GIB, ram_bytes=64 * GIB, card=card).placement
    found = {
        each: seconds_of(of, work, placement, card.rates, whole(of.config, work)).arithmetic
        for each, of in sizes.items()
    }
    assert found["int8"] < found[name] < found["bf16"]
    assert sizes["int8"].weight_bytes < sizes[name].weight_bytes < sizes["bf16"].weight_bytes
    assert placement.kv == "int8"


AWAY = {"offload_model": True, "offload_kv_cache": True}
RUNS = [
    ("FFN-down in bf16", AWAY),
    ("all of the FFN in bf16", {}),
    ("attention in bf16", {"offload_model": True}),
    ("every layer otherwise", {}),
    ("every layer otherwise", AWAY),
]


@pytest.mark.parametrize(("name", "asked"), RUNS, ids=lambda value: value if isinstance(value, str) else len(value))
def test_a_run_takes_what_is_planned(artifacts, name, asked, monkeypatch):
    """With PyTorch's own kernels, which a plan has room for: beside few layers it shows what Triton's take less."""
    monkeypatch.setenv("LOWVRAM_TRITON", "0")
    artifact = artifacts(name)
    found = planned_apart(artifact, torch.bfloat16, **asked)
    assert found.precision == "mixed"
    assert_as_planned(found, dry_run(artifact, found, layout=APART, capacity=found.peak_vram_bytes))


def test_fp8_linears_are_widened_where_a_card_has_no_units_for_them(artifacts):
    ampere = CARDS["rtx3090"]
    found = plan(
        artifacts("text in fp8, its queries in bf16"),
        Workload.of_size("256*192"),
        PlanOptions(),
        vram_bytes=20 * GIB,
        ram_bytes=64 * GIB,
        card=ampere,
    )
    assert any("fp8 weights are widened" in note for note in found.notes)
    rates = dataclasses.replace(CARD.rates, fp8=None)
    assert rates.of("fp8", torch.bfloat16) == rates.bf16


def test_the_plan_of_the_command_line(artifacts):
    arguments = ["plan", "--model", str(artifacts("FFN-down in bf16").path), "--gpu", "rtx4090", "--size", "256*192"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["precision"] == "mixed"
    assert f"{LAYERS}" in CliRunner().invoke(main, arguments).output
