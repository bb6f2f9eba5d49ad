"""The full-size benchmark's script on the tiny preset: what a machine without a GPU can run of it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "full_size.py"


@pytest.fixture
def full_size(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--preset", "tiny", "--device", "cpu"])
    import full_size

    return full_size


def options(folder: Path, only: list[str], **changes) -> argparse.Namespace:
    values = {"preset": "tiny", "device": "cpu", "dir": folder, "only": only, "resume": False, "limit_s": 60.0}
    values |= {"vram_budget": "22.15GiB", "ram_budget": None, "seed": 0, "out": folder / "result.json"}
    return argparse.Namespace(**values | changes)


def here(full_size, asked: list[str]):
    """A part in this process: importing everything again would take longer than the part."""

    def run(part: str, given: argparse.Namespace) -> dict:
        asked.append(part)
        answer = given.dir / "answer.json"
        full_size.answer(argparse.Namespace(**vars(given) | {"child": part, "answer": answer}))
        return json.loads(answer.read_text())

    return run


def test_parts_are_measured_merged_and_told(full_size, tmp_path, capsys):
    asked: list[str] = []
    run = here(full_size, asked)
    full_size.measure(options(tmp_path, ["run-capped-int8"]), run)
    full_size.measure(options(tmp_path, ["layers-int8", "diffusers-int8", "run-capped-int8"], resume=True), run)
    result = json.loads((tmp_path / "result.json").read_text())
    parts = result["parts"]
    assert list(parts) == ["artifact-int8", "run-capped-int8", "layers-int8", "diffusers-int8"]
    assert all("measured" in part for part in parts.values()), parts

    assert asked == ["machine", "artifact-int8", "run-capped-int8", "machine", "layers-int8", "diffusers-int8"]

    clips = parts["run-capped-int8"]["measured"]
    assert clips["frames"] == 3 * 48 - 3
    assert len(clips["delivery_intervals_s"]) == 11
    assert 0 < clips["steady_s_per_block"] < clips["seconds"]
    assert clips["peak_reserved_bytes"] is None
    assert clips["given_up"] == []

    layers = parts["layers-int8"]["measured"]
    assert layers["lowvram"]["bytes_in_per_pass"] == layers["weight_bytes"]
    # Who brings the weights changes nothing: both computed the same block.
    assert set(parts["diffusers-int8"]["measured"]["latents"]) == {layers["lowvram"]["latents"]}

    told = capsys.readouterr().out
    assert "| run-capped-int8 | none | not measured" in told
    assert "streams needs a CUDA device" in told


def test_what_fails_is_recorded_and_stops_nothing(full_size, tmp_path):
    def run(part: str, given: argparse.Namespace) -> dict:
        if part == "machine":
            return here(full_size, [])(part, given)
        return full_size.run_part(part, given)

    full_size.measure(options(tmp_path, ["artifact"], limit_s=0.05), run)
    parts = json.loads((tmp_path / "result.json").read_text())["parts"]
    assert {part["not_measured"] for part in parts.values()} == {"took longer than 0 s"}
    assert list(parts) == ["artifact-int8", "artifact-bf16"]


@pytest.mark.parametrize(("wave", "groups"), [(1, 7), (2, 3), (3, 1), (4, 4)])
def test_the_steady_state_has_full_waves_only(full_size, wave, groups):
    import full_size_parts

    found = full_size_parts.steady_groups(wave)
    assert len(found) == groups
    assert all(block > 4 for group in found for block in group)


def test_copies_hidden_are_those_that_lengthen_nothing(full_size):
    import full_size_table

    rates = {"h2d": 10.0, "d2h": 10.0}
    free = {"steady_s_per_block": 2.0, "bytes_in_per_block": 0.0, "bytes_out_per_block": 10.0, "rates": rates}
    capped = free | {"steady_s_per_block": 2.5, "bytes_in_per_block": 30.0}
    assert full_size_table.hidden_share(capped, free) == pytest.approx(1 - 0.5 / 2)
    assert full_size_table.hidden_share(free, free) is None


def test_the_readme_table_is_made_of_results(full_size, tmp_path):
    import full_size_table

    assert full_size_table.readme(tmp_path).count("not measured") == 4
    run = {"vram_budget_bytes": 22 * 2**30, "size": "704*384", "peak_reserved_bytes": 21 * 2**30}
    run |= {"steady_s_per_block": 1.5, "steady_frames_per_second": 8.0}
    machine = {"preset": "14b", "gpu": "NVIDIA GeForce RTX 4090"}
    result = {"machine": machine, "parts": {"run-capped-int8": {"measured": run}}}
    (tmp_path / "full_size_x.json").write_text(json.dumps(result))
    told = full_size_table.readme(tmp_path)
    row = "| RTX 4090, 24 GB | 14B, int8, 704*384, held to 22.00 GiB | 21.00 GiB | 1.50 (8.0 frames/s) |"
    assert row in told.splitlines()
    assert told.count("not measured") == 2
    result["machine"]["preset"] = "tiny"
    (tmp_path / "full_size_x.json").write_text(json.dumps(result))
    assert full_size_table.readme(tmp_path).count("not measured") == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["no CUDA device here; --preset tiny --device cpu tries the script without one"]
