"""What follows from results."""

from __future__ import annotations

import logging

import pytest
import torch

from lowvram.offload import replaying
from lowvram.selftest.results import REPLAYS, Result, Subject, judge
from lowvram_kernels import choices

CARD = torch.device("cuda", 0)


def result(operation="norm_rope", backend="triton", status="passed", *, seconds=None, size="14B", message="") -> Result:
    subject = Subject(name=f"{operation}: {backend}, {size}", operation=operation, backend=backend, size=size)
    return Result(subject=subject, status=status, seconds=seconds, message=message)


def test_what_passes_changes_nothing():
    verdict = judge([result(seconds=1.0), result(backend="torch", seconds=2.0)])
    assert (verdict.off, verdict.preferred, verdict.stuck) == ((), (), ())


def test_one_failed_size_switches_a_backend_off_for_its_operation_alone(caplog):
    results = [
        result(size="small"), result(status="failed", message="off by 3"), result(backend="torch"),
        result("add_gated"), result("add_gated", "torch"),
    ]  # fmt: skip
    verdict = judge(results)
    with choices.restored(), caplog.at_level(logging.WARNING):
        verdict.apply(CARD)
        (note,) = (note for note in choices.noted() if note.device == str(CARD))
    assert (note.operation, note.backend, note.device, note.verdict) == ("norm_rope", "triton", "cuda:0", "off")
    assert "off by 3" in note.reason
    assert "report it" in note.reason
    assert "norm_rope: triton is switched off (14B shapes: off by 3); torch runs instead" in caplog.text
    assert not verdict.stuck


def test_a_reference_that_fails_is_not_gone_around():
    bad = result(backend="torch", status="failed")
    verdict = judge([result(), bad])
    assert verdict.stuck == (bad,)
    assert not verdict.off


def test_where_nothing_passes_nothing_is_switched_off():
    results = [result(status="failed"), result(backend="torch", status="failed")]
    assert {one.subject.backend for one in judge(results).stuck} == {"triton", "torch"}
    assert not judge(results).off


def test_what_was_skipped_is_not_trusted():
    verdict = judge([result(status="failed"), result(backend="torch", status="skipped")])
    assert not verdict.off
    assert verdict.stuck


def test_a_failure_that_is_no_kernels_is_not_gone_around():
    failed = Result(subject=Subject(name="copies"), status="failed")
    assert judge([failed, Result(subject=Subject(name="tiny"), status="skipped")]).stuck == (failed,)


@pytest.mark.parametrize(("triton", "torch_", "preferred"), [(1.0, 0.5, "torch"), (1.0, 0.97, None), (0.5, 1.0, None)])
def test_the_fastest_right_backend_is_preferred(triton, torch_, preferred):
    verdict = judge([result(seconds=triton), result(backend="torch", seconds=torch_)])
    assert [one.backend for one in verdict.preferred] == ([preferred] if preferred else [])


@pytest.mark.parametrize("status", ["passed", "failed", "skipped", None])
@pytest.mark.parametrize("device", ["cuda:0", "cuda"])
def test_a_card_is_trusted_with_graphs_only_where_they_were_seen_to_be_right(status, device):
    results = [result(), result(backend="torch")]
    results += [Result(subject=Subject(name=REPLAYS), status=status)] if status else []
    replaying.reset()
    try:
        judge(results).apply(torch.device(device))
        assert replaying.trusted(torch.device("cuda:0")) is (status == "passed")
        assert replaying.trusted(torch.device("cuda:1")) is (status == "passed" and device == "cuda")
    finally:
        replaying.reset()


def test_small_shapes_and_wrong_results_do_not_decide_what_is_fast():
    results = [
        result(seconds=1.0), result(backend="torch", seconds=0.1, size="small"),
        result("linear_w8a8 int8", seconds=1.0), result("linear_w8a8 int8", "torch._int_mm", "failed", seconds=0.1),
        result("linear_w8a8 int8", "torch float32", seconds=2.0),
    ]  # fmt: skip
    verdict = judge(results)
    assert not verdict.preferred
    assert [(one.backend, one.instead) for one in verdict.off] == [("torch._int_mm", "triton")]
