"""``lowvram plan`` as a person calls it."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from lowvram.cli import main
from lowvram.commands.plan import PlanRequest, plan_for, plan_team_for

PLAN = ["plan", "--vram", "22.15GiB", "--ram", "64GiB", "--size", "704*384", "--infer_frames", "48", "--gpu", "rtx4090"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_json_has_what_programs_read():
    result = run(*PLAN, "--preset", "14b", "--json")
    assert result.exit_code == 0
    plan = json.loads(result.stdout)
    assert plan["fits"] is True
    assert plan["vram_budget_bytes"] == int(22.15 * 2**30)
    assert 0.95 * plan["vram_budget_bytes"] < plan["peak_vram_bytes"] <= plan["vram_budget_bytes"]
    assert 3 * 2**30 < plan["peak_host_bytes"] < 48 * 2**30
    assert plan["kv_ring_bytes"] == pytest.approx(19.3 * 2**30, rel=0.01)
    assert plan["sink_bytes"] == pytest.approx(1.0 * 2**30, rel=0.01)
    assert plan["weight_bytes"] == pytest.approx(16.6e9, rel=0.01)
    assert plan["pcie_bytes_per_block"] == plan["pcie_h2d_bytes_per_block"] + plan["pcie_d2h_bytes_per_block"]
    assert plan["seconds_per_block"] > plan["limits"]["int8_arithmetic_s"]
    assert plan["limited_by"] in ("arithmetic", "pcie")


def test_the_table_says_where_things_are_and_why_the_published_way_does_not_fit():
    result = run(*PLAN)
    assert result.exit_code == 0
    for words in ("704*384", "resident layers", "decode", "22.15 GiB", "limited by", "85.", "Note: seconds"):
        assert words in " ".join(result.stdout.split())


def test_a_refusal_has_figures_and_exits_with_1():
    arguments = [*PLAN, "--vram", "5GiB"]
    plain, as_json = run(*arguments), run(*arguments, "--json")
    assert plain.exit_code == as_json.exit_code == 1
    assert plain.stderr.startswith("lowvram: error: 704*384 with 48 frames a clip and 4 steps does not fit: 5.")
    assert plain.stderr.count("\n") == 1
    assert not plain.stdout
    plan = json.loads(as_json.stdout)
    assert plan["fits"] is False
    assert plan["peak_vram_bytes"] > plan["vram_budget_bytes"] == 5 * 2**30
    assert plan["refused"] in plain.stderr


def test_an_artifact_is_planned_like_its_preset(published):
    options = ["--vram", "30GiB", "--gpu", "h100", "--kv", "bf16", "--wave", "2", "--json"]
    artifact = run("plan", "--model", str(published("bf16")), *options)
    preset = run("plan", "--preset", "14b", "--precision", "bf16", *options)
    assert artifact.exit_code == 0
    assert json.loads(artifact.stdout) == json.loads(preset.stdout)
    assert json.loads(artifact.stdout)["placement"]["wave"] == 2


def test_everything_can_be_kept_on_the_host():
    plan = json.loads(run(*PLAN, "--offload_model", "True", "--offload_kv_cache", "--json").stdout)
    assert len(plan["placement"]["streamed_layers"]) == 40
    assert len(plan["placement"]["host_rings"]) == 160


def test_the_text_encoder_may_run_on_the_host():
    small = ["plan", "--preset", "tiny", "--gpu", "rtx4090", "--size", "128*128", "--json"]
    plain, asked = (json.loads(run(*small, *more).stdout) for more in ([], ["--t5_cpu"]))
    assert (plain["text_encoder_device"], asked["text_encoder_device"]) == ("cuda", "cpu")
    assert asked["stage_peak_bytes"]["encode_text"] == 0 < plain["stage_peak_bytes"]["encode_text"]
    assert "the text encoder is to run on the host, once a video" in asked["notes"]
    several = json.loads(run(*small, "--gpus", "2", "--t5_cpu", "True").stdout)
    assert [rank["text_encoder_device"] for rank in several["ranks"]].count("cpu") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vram", "much"], "no amount of memory"),
        (["--gpu", "voodoo2"], "--gpu is 'voodoo2'"),
        (["--size", "12"], "unknown size"),
        (["--wave", "5"], "--wave is 5"),
        (["--wave", "most"], "--wave is 'most'"),
        (["--infer_frames", "13"], "--infer_frames is 13"),
        (["--model", "nowhere"], "nowhere is not there"),
        (["--model", "nowhere", "--precision", "int8"], "leave them out"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, message):
    result = run(*PLAN, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_without_a_card_it_is_said_whose_speeds_are_shown(published, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = plan_for(published("int8"), PlanRequest())
    assert "no CUDA device is here" in result.notes[0]
    assert result.vram_budget_bytes == result.card.usable_bytes
    assert result.ram_budget_bytes == 64 * 2**30


def test_a_card_at_hand_is_measured(published, monkeypatch):
    from lowvram.commands import plan as command
    from lowvram.planning import CARDS

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(command, "card_at_hand", lambda device: CARDS["rtx5090"])
    result = plan_for(published("int8"), PlanRequest(ram_budget=200 << 30))
    assert result.card.name == "rtx5090"
    assert not any("no CUDA device" in note for note in result.notes)


def test_a_dry_run_stands_beside_the_plan():
    result = run("plan", "--preset", "tiny", "--precision", "bf16", "--vram", "2GiB", "--size", "128*128", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "simulated" in result.stdout
    told = run(*PLAN[:1], "--preset", "tiny", "--precision", "bf16", "--size", "128*128", "--dry-run", "--json")
    simulated = json.loads(told.stdout)["dry_run"]
    assert f"Simulated with the kernels of {simulated['kernels']}." in result.stdout
    assert simulated["given_up"] == []
    assert 0 < simulated["stages"]["denoise"] <= simulated["peak_reserved"]


@pytest.mark.parametrize("gpus", [(), ("--gpus", "2", "--ulysses_size", "2")])
def test_a_dry_run_without_triton_says_so(monkeypatch, gpus):
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.delenv("LOWVRAM_TRITON", raising=False)
    monkeypatch.setattr("lowvram_kernels.chips.has_triton", lambda: False)
    short = ["--size", "128*128", "--infer_frames", "12", "--sample_steps", "1", "--vram", "2GiB"]
    result = run("plan", "--preset", "tiny", "--precision", "int8", *short, *gpus, "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("Simulated with the kernels of torch (triton is not installed).") == 1


SEVERAL = [*PLAN, "--gpus", "4"]


def test_several_gpus_as_json():
    plan = json.loads(run(*SEVERAL, "--json").stdout)
    assert plan["fits"] is True
    assert plan["layout"] == {"num_gpus_dit": 3, "ulysses_size": 1, "vae_rank": True, "stages": 3}
    assert [rank["role"] for rank in plan["ranks"]][::3] == ["rank 0 (stage 0, part 0)", "rank 3 (VAE)"]
    for rank in plan["ranks"]:
        assert rank["peak_vram_bytes"] <= rank["vram_budget_bytes"] == int(22.15 * 2**30)
    (machine,) = plan["machines"]
    assert sum(rank["host_bytes"]["pinned_rings"] for rank in plan["ranks"]) == machine["host_bytes"]["pinned_rings"]
    assert machine["peak_host_bytes"] <= machine["ram_budget_bytes"] == 64 * 2**30
    assert list(plan["seconds"]) == ["stage 0", "stage 1", "stage 2", "VAE"]
    assert plan["seconds_per_block"] == max(rank["seconds_per_block"] for rank in plan["ranks"])
    by_layout = {json.dumps(other["layout"]): other for other in plan["alternatives"]}
    assert len(by_layout) == len(plan["alternatives"]) == 5
    assert by_layout[json.dumps(plan["layout"])]["frames_per_second"] == plan["frames_per_second"]


def test_several_gpus_as_tables(monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    result = run(*SEVERAL, "--num_gpus_dit", "3", "--ulysses-size", "3", "--enable_vae_parallel")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    for words in ("4 GPUs: 3 for the DiT (1 stage x 3), 1 for the VAE", "rank 1 (stage 0, part 1)", "rank 3 (VAE)"):
        assert words in said
    for words in ("Host memory", "All layouts", "4 for the DiT (2 stages x 2)", "10 GB/s each way, as is assumed"):
        assert words in said


def test_layouts_that_do_not_fit_are_shown_with_the_reason(monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    options = ["--gpus", "2", "--vram", "4.9GiB"]
    forced = run(*PLAN, *options, "--enable_vae_parallel")
    said = " ".join(forced.stdout.split())
    assert forced.exit_code == 0, forced.output
    assert "does not fit" in said
    assert "GiB there" in said
    plain, as_json = (run(*PLAN, "--gpus", "2", "--vram", "2GiB", *more) for more in ([], ["--json"]))
    assert plain.exit_code == as_json.exit_code == 1
    assert plain.stderr.startswith("lowvram: error: 704*384 with 48 frames a clip and 4 steps does not fit on rank ")
    refused = json.loads(as_json.stdout)
    assert (refused["fits"], len(refused["ranks"])) == (False, 2)
    assert refused["refused"] in plain.stderr
    assert [other["fits"] for other in refused["alternatives"]] == [False] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ulysses-size", "2"], "--ulysses_size has an effect on several GPUs only"),
        (["--num_gpus_dit", "1"], "--num_gpus_dit has an effect on several GPUs only"),
        (["--enable_vae_parallel", "False"], "--enable_vae_parallel has an effect on several GPUs only"),
        (["--gpus", "0"], "--gpus is 0"),
        (["--gpus", "4", "--num_gpus_dit", "2"], "4 ranks"),
        (["--gpus", "4", "--ulysses-size", "3", "--enable_vae_parallel", "False"], "no whole number of stages"),
        (["--gpus", "5", "--ulysses-size", "1", "--enable_vae_parallel", "False"], "5 stages for 4 denoising steps"),
    ],
)
def test_layouts_that_cannot_be_are_refused(options, message):
    result = run(*PLAN, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_cards_at_hand_are_measured_each(published, monkeypatch):
    from lowvram.commands import plan as command
    from lowvram.planning import CARDS

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    names = ["rtx5090", "rtx4090"]
    monkeypatch.setattr(command, "card_at_hand", lambda device: CARDS[names[device.index]])
    team = plan_team_for(published("int8"), PlanRequest(ram_budget=200 << 30, gpus=3)).team
    assert [rank.card.name for rank in team.ranks] == ["rtx5090", "rtx4090", "rtx5090"]
    assert not any("no CUDA device" in note for note in team.notes)


def test_dry_runs_of_all_ranks_stand_beside_the_plan(monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    short = ["--size", "128*128", "--infer_frames", "12", "--sample_steps", "1", "--vram", "2GiB"]
    small = ["plan", "--preset", "tiny", "--precision", "bf16", *short, "--gpus", "2", "--ulysses_size", "2"]
    result = run(*small, "--dry-run")
    assert result.exit_code == 0, result.output
    assert all(f"{rank}, simulated" in result.stdout for rank in range(2))


def test_without_cards_it_is_said_whose_speeds_several_have(published, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    team = plan_team_for(published("int8"), PlanRequest(gpus=2)).team
    assert "no CUDA device is here" in team.notes[0]
