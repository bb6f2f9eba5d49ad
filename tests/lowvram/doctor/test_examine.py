"""Whole machines: what is said of each, and that nothing hides behind a question that fails."""

from __future__ import annotations

import dataclasses
import re
import tempfile

import pytest

from lowvram.doctor.examine import Options, examine
from lowvram.doctor.findings import to_json
from lowvram.planning.model_sizes import model_sizes
from lowvram_kernels.errors import CheckpointError, ConfigError
from lowvram_quantize.format import Artifact
from lowvram_quantize.shape_artifact import write_shape_artifact
from tests.lowvram.doctor.invented import GIB, four_4090s, gpu, h200, machine, raising, rtx3090, wsl


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    return model_sizes(Artifact.open(write_shape_artifact(tmp_path_factory.mktemp("doctor") / "14b")))


def said(probes, sizes, **options) -> dict:
    findings = examine(probes, Options(sizes=lambda: sizes, **options))
    for finding in findings:
        # Whatever is not in order says what to do and why, in one line.
        assert (finding.status == "ok") != bool(finding.advice and finding.why)
        assert not re.search(r"\s\s|\n", finding.text())
    by_name = {finding.check: finding for finding in findings}
    assert len(by_name) == len(findings)
    return by_name


def statuses(found: dict, *wanted: str) -> set[str]:
    return {name for name, finding in found.items() if finding.status in wanted}


def test_a_sound_machine_has_nothing_to_set(sizes):
    found = said(machine(rtx3090()), sizes)
    assert not statuses(found, "warning", "problem")
    assert {"python", "torch", "driver", "gpu 0", "vram 0", "pcie 0", "ram", "pinning"} <= set(found)


def test_data_centre_cards_that_reach_each_other(sizes):
    assert not statuses(said(machine(h200(0), h200(1)), sizes), "warning", "problem")


def test_four_4090s_are_told_to_do_without_peers(sizes):
    found = said(four_4090s(), sizes)
    assert statuses(found, "warning", "problem") == {"p2p"}
    assert "NCCL_P2P_DISABLE=1" in found["p2p"].advice
    assert all(f"pcie {index}" in found for index in range(4))


def test_the_port_is_taken(sizes):
    found = said(four_4090s(bind="taken by another program"), sizes, port=29500)
    assert statuses(found, "problem") == {"port"}
    assert "40000" in found["port"].advice
    assert "port" not in said(machine(gpu()), sizes)


def test_wsl(sizes):
    found = said(wsl(), sizes)
    assert statuses(found, "warning") >= {"wsl", "pinning"}
    assert found["ram"].status == "problem"
    assert ".wslconfig" in found["pinning"].advice


def test_a_laptop_with_8_gb_and_a_small_card(sizes):
    laptop = machine(rtx3090(total_bytes=6 * GIB, free_bytes=4 * GIB), ram=(5 * GIB, 8 * GIB))
    assert statuses(said(laptop, sizes), "problem") == {"vram 0", "ram"}


def test_without_a_gpu_nothing_is_a_problem(sizes):
    found = said(machine(ram=(5 * GIB, 8 * GIB)), sizes)
    assert statuses(found, "warning") == {"gpus", "driver", "ram"}
    assert not statuses(found, "problem")
    assert not any(name.startswith(("pcie", "vram")) for name in found)


def test_without_a_gpu_a_model_that_was_named_has_to_fit(sizes):
    found = said(machine(ram=(5 * GIB, 8 * GIB)), sizes, converted=True)
    assert statuses(found, "problem") == {"ram"}


def test_ranks_on_the_processor(sizes):
    found = said(machine(), sizes, gpus=2)
    assert found["gloo"].status == found["port"].status == found["nccl"].status == "ok"
    assert "p2p" not in found


def test_more_ranks_than_cards(sizes):
    found = said(four_4090s(), sizes, gpus=5)
    assert found["gpus"].status == "problem"
    assert "4" in found["gpus"].found
    assert "5" in found["gpus"].expected


def test_only_the_cards_that_are_used_are_looked_at(sizes):
    found = said(machine(gpu(0), gpu(1, free_bytes=GIB)), sizes, gpus=1)
    assert "vram 1" not in found
    assert found["vram 0"].status == "ok"


def test_nothing_is_measured_where_that_is_not_wanted(sizes):
    probes = machine(gpu(), pcie=raising(AssertionError("measured")))
    assert "pcie 0" not in said(probes, sizes, measure=False)


FIELDS = [field.name for field in dataclasses.fields(machine()) if field.name not in ("free_port",)]


@pytest.mark.parametrize("name", FIELDS)
def test_a_question_that_fails_is_a_problem_and_the_others_go_on(sizes, name):
    probes = four_4090s(**{name: raising(OSError("no answer"))})
    found = said(probes, sizes)
    failed = [finding for finding in found.values() if "could not be checked (OSError: no answer)" in finding.found]
    assert failed
    assert {finding.status for finding in failed} == {"problem"}
    assert found["wsl" if name != "kernel" else "ffmpeg"].status == "ok"


def test_a_disk_too_full_to_ask_for_the_sizes(sizes):
    findings = examine(machine(gpu()), Options(sizes=raising(OSError(28, "No space left"))))
    plan = next(finding for finding in findings if finding.check == "plan")
    assert plan.status == "problem"
    assert any(finding.check == "vram 0" for finding in findings)


def test_an_artifact_that_was_named_and_is_none_ends_it():
    with pytest.raises(CheckpointError):
        examine(machine(), Options(sizes=raising(CheckpointError("gone")), converted=True))


@pytest.mark.parametrize("options", [{"gpus": 0}, {"port": 0}, {"port": 70000}])
def test_options_that_cannot_be(options):
    with pytest.raises(ConfigError, match="expected"):
        Options(sizes=lambda: None, **options)


def test_as_json(sizes):
    found = to_json(examine(four_4090s(bind="taken"), Options(sizes=lambda: sizes)))
    assert (found["healthy"], found["problems"], found["warnings"]) == (False, 1, 1)
    assert {"check", "status", "found", "expected", "advice", "why"} == set(found["findings"][0])
    assert tempfile.gettempdir() in " ".join(finding["check"] for finding in found["findings"])
