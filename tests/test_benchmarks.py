"""Scripts of the full-size and of the parallel benchmark on the tiny preset: what a machine without a GPU can run."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.lowvram.fake_capture import FakeCapture

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


def test_graphs_are_not_measured_without_a_cuda_device(full_size, tmp_path):
    full_size.measure(options(tmp_path, ["graphs-int8"]), here(full_size, []))
    parts = json.loads((tmp_path / "result.json").read_text())["parts"]
    assert parts["graphs-int8"]["not_measured"] == "there are no CUDA graphs without a CUDA device"


@pytest.mark.parametrize("scheme", ["int8", "plain"])
@torch.inference_mode()
def test_a_block_is_timed_cold_and_warm_and_replayed_to_the_same_values(full_size, scheme):
    import kernel_block

    sizes = kernel_block.Sizes(dim=32, ffn_dim=64, heads=2, text_tokens=8, tokens=8, ring_tokens=16, sink_tokens=8)
    calls: list[str] = []

    def median_ms(work) -> float:
        calls.append(work.__name__)
        return float(len(calls))

    capture, cpu = FakeCapture(), torch.device("cpu")
    row = kernel_block.graph_row(median_ms, sizes, scheme, torch.float32, cpu, capture, lambda: None)
    assert calls == ["eager", "replay"]
    assert row["equal"]
    assert row["speedup"] == 0.5
    assert row["cold"].keys() == {"first_call_s", "capture_s"}
    assert row["warm"].keys() == {"eager_ms", "eager_host_ms", "replayed_ms", "replayed_host_ms"}
    assert len(capture.graphs) == 1


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


@pytest.fixture
def parallel(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    import parallel

    return parallel


@pytest.mark.slow
def test_ranks_send_and_hold_what_formulas_say(parallel, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    names = ["fsdp-2", "stages-2", "ulysses-2", "ulysses-2-int8-streamed"]
    tiny = parallel.count(names)
    rows = {row["name"]: row for row in tiny["rows"]}
    assert sorted(rows) == names
    assert all(row["as_expected"] for row in rows.values()), tiny["rows"]
    assert tiny["same_latents"] == {"fsdp-2 and ulysses-2": True}
    assert {name for name in names if rows[name]["sent_bytes"]["parameters"]} == {"fsdp-2"}
    assert {name for name in names if rows[name]["sent_bytes"]["exchange"]} == set(names) - {"stages-2"}


def test_a_count_that_differs_is_told(parallel, tmp_path):
    import parallel_formulas

    from lowvram_quantize.shape_artifact import write_shape_artifact

    path = write_shape_artifact(tmp_path / "tiny", precision="bf16", preset="tiny")
    (job,) = parallel.chosen(parallel.all_jobs({"bf16": path, "int8": path}), ["stages-2"])
    first = {"exchange": 0, "latents": 16 * 3 * 16 * 16 * 4, "parameters": 0}
    reports = [
        {"role": "", "sent_bytes": sent, "sent_bytes_by_runtime": sent, "parameter_bytes": 1}
        for sent in (first, dict.fromkeys(first, 0))
    ]
    row = parallel_formulas.compared(job, reports)
    assert not row["as_expected"]
    expected = [rank["formula"]["parameter_bytes"] for rank in row["by_rank"]]
    for report, nbytes in zip(reports, expected, strict=True):
        report["parameter_bytes"] = nbytes
    assert parallel_formulas.compared(job, reports)["as_expected"]
    reports[0]["sent_bytes_by_runtime"] = first | {"latents": 0}
    assert not parallel_formulas.compared(job, reports)["as_expected"]


def test_units_are_padded_shards(parallel):
    import parallel_formulas

    fsdp = parallel_formulas.Fsdp(blocks=[[(3, 2)], [(1, 6), (4,)]], root=[(2, 2)], ranks=2)
    # Shards of 2 x 2, of 1 x 6 and 2, and of 1 x 2 values in bfloat16.
    assert fsdp.sent(steps=3) == 3 * 2 * (4 + 8)
    assert fsdp.held() == 2 * (4 + 8 + 2) + 2 * 2 * (2 + 8)


def test_what_can_be_timed_is_and_what_fails_says_why(parallel, monkeypatch, tmp_path):
    asked = []

    def run(jobs):
        asked.extend(jobs)
        if jobs[0].fsdp:
            raise RuntimeError("ranks ended with [1, 1]")
        return {jobs[0].name: [{"seconds_per_block": 1.0}, {"seconds_per_block": 2.0}]}

    monkeypatch.setattr(parallel, "run_jobs", run)
    found = parallel.time_jobs(["*-2", "*-2-vae"], tmp_path, preset="tiny", device="cpu", ranks=2)["found"]
    times = dict.fromkeys([f"{kind}-2-{name}" for kind in ("ulysses", "stages") for name in ("int8", "bf16")], 2.0)
    assert found == times | {"fsdp-2-bf16": {"not_measured": "ranks ended with [1, 1]"}}
    assert not any(job.counts for job in asked)
