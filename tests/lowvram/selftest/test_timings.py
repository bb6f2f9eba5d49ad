"""What the checks at the 14B's shapes timed is what a plan of that card reckons with."""

from __future__ import annotations

import dataclasses

import pytest

from lowvram.planning import CARDS, Workload, plan
from lowvram.planning.measure import card_at_hand
from lowvram.planning.memory_costs import GIB
from lowvram.planning.operation_rates import OPERATION_RATES
from lowvram.planning.timed import keep_timed, timed_on
from lowvram.selftest.results import Result, Subject
from lowvram.selftest.timings import _PARTS, operation_rates
from lowvram_kernels.choices import OPERATIONS
from lowvram_quantize.format import Artifact
from lowvram_quantize.shape_artifact import write_shape_artifact
from tests.lowvram.planning.test_measure import DEVICE, FakeRunner

LINEAR = 2 * 3168 * 5120 * 13824


def result(operation: str, seconds: float | None, *, backend="triton", size="14B", status="passed") -> Result:
    subject = Subject(name=f"{operation}: {backend}, {size}", operation=operation, backend=backend, size=size)
    return Result(subject=subject, status=status, seconds=seconds)


def test_names_are_those_of_checks_and_of_the_table():
    assert set(_PARTS) <= set(OPERATION_RATES)
    assert {check for parts in _PARTS.values() for check in parts} <= set(OPERATIONS)


def test_the_fastest_that_is_right_counts():
    found = operation_rates(
        [
            result("linear_w8a8 int8", 0.002),
            result("linear_w8a8 int8", 0.001, backend="int mm"),
            result("linear_w8a8 int8", 0.0001, backend="wrong", status="failed"),
            result("linear_w8a8 int8", 0.00001, size="small"),
            result("linear_w8a8 int8 gelu", 0.003),
            result("ring_attention", 0.01),
        ]
    )
    assert found["int8 Linear"] == pytest.approx(2 * LINEAR / 0.004)
    assert found["int8 attention"] == pytest.approx(4 * 3168 * 5120 * 4 * 3168 / 0.01)
    assert set(found) == {"int8 Linear", "int8 attention"}


@pytest.mark.parametrize(
    "results",
    [
        [],
        [result("linear_w8a8 int8", 0.002)],
        [result("linear_w8a8 int8", 0.002), result("linear_w8a8 int8 gelu", None)],
        [result("linear_w8a8 fp8", 0.002), result("linear_w8a8 fp8 gelu", 0.1, status="failed")],
        [result("ring_attention", 0.002, size="small")],
        [result("add_gated", 0.002)],
    ],
)
def test_what_was_not_timed_whole_is_left_to_the_table(results):
    assert operation_rates(results) == {}


def test_a_card_at_hand_has_what_was_kept_for_it(tmp_path):
    cards, timed = tmp_path / "cards.json", tmp_path / "timed.json"
    keep_timed("another card", {"int8 Linear": 1e14}, file=timed)
    assert card_at_hand(DEVICE, runner=FakeRunner(), file=cards).rates.timed == ()
    keep_timed(FakeRunner().key, {"int8 Linear": 2e14, "int8 attention": 3e14}, file=timed)
    keep_timed(FakeRunner().key, {}, file=timed)
    card = card_at_hand(DEVICE, runner=FakeRunner(), file=cards)
    assert card.rates.timed == (("int8 Linear", 2e14), ("int8 attention", 3e14))
    assert timed_on("another card", file=timed) == (("int8 Linear", 1e14),)
    model = Artifact.open(write_shape_artifact(tmp_path / "tiny", preset="tiny", precision="int8"))
    card = dataclasses.replace(CARDS["rtx4090"], rates=card.rates)
    found = plan(model, Workload.of_size("128*128"), vram_bytes=8 * GIB, ram_bytes=64 * GIB, card=card)
    sources = {task.name: task.reached.source for task in found.tasks}
    assert sources["Linears, int8"] == sources["attention, p v, int8"] == "timed by selftest"


@pytest.mark.parametrize(
    "text", ["[", "[]", '{"a": {"int8 Linear": "fast"}}', '{"a": {"int8 Linear": -1}}', '{"a": {"?": 1}}']
)
def test_a_file_that_cannot_be_used_counts_as_none(tmp_path, text):
    file = tmp_path / "timed.json"
    file.write_text(text)
    assert timed_on("a", file=file) == ()
    keep_timed("a", {"VAE convolution": 1e13}, file=file)
    assert timed_on("a", file=file) == (("VAE convolution", 1e13),)
