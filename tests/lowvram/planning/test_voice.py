"""The audio encoder that stays on the host for a long voice is planned for, by everybody who plans."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from lowvram.cli import main
from lowvram.offload.placement import PlanOptions
from lowvram.planning import workspace
from lowvram.planning.card_table import CARDS
from lowvram.planning.memory import host_parts, machine_parts
from lowvram.planning.model_sizes import AudioSizes
from lowvram.planning.planner import plan
from lowvram.planning.rank_plan import DoesNotFit, Plan
from lowvram.planning.search import Job
from lowvram.planning.workload import Workload
from lowvram.request import Inputs, Request
from lowvram_models.audio_encoder import build_wav2vec2
from lowvram_models.constants import SPEECH_RATE_HZ
from tests.lowvram.planning.live_bytes import LiveBytes

GIB = 2**30
SHORT = Workload.of_size("704*384")
LONG = dataclasses.replace(SHORT, voice_on_host=True)


def test_it_lies_beside_what_is_pinned_and_not_beside_the_text_encoder(sizes):
    job = Job(sizes=sizes("int8"), work=LONG, kv="int8", text_device="cpu")
    placement = job.placement(20, 40, 1)
    parts = host_parts(job.sizes, LONG, placement, "cpu", job.share)
    weights = sizes("int8").audio.parameters * 4
    assert weights == pytest.approx(1.26e9, rel=0.01)
    assert weights < parts.voice_encoder < 1.7 * weights
    pinned = parts.pinned_weights + parts.pinned_rings + parts.pinned_cache
    assert parts.peak == parts.base + max(pinned + parts.voice_encoder, parts.text_encoder)
    assert host_parts(job.sizes, SHORT, placement, "cpu", job.share).voice_encoder == 0
    machine = machine_parts(job.sizes, [parts], [placement.streamed_layers])
    assert machine.peak == parts.peak


def test_its_workspace_is_that_of_a_window():
    """Counted over the encoder itself, on tensors without values."""
    config = {
        "model_type": "wav2vec2", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True,
    }  # fmt: skip
    with torch.device("meta"):
        model = build_wav2vec2(config)
    samples = torch.empty(1, workspace.WINDOW_S * SPEECH_RATE_HZ, device="meta")
    with torch.no_grad(), LiveBytes([samples, *model.parameters(), *model.buffers()]) as live:
        model(samples, output_hidden_states=True)
    audio = AudioSizes(parameters=0, width=1024, layers=24, heads=16, conv_channels=512, conv_stride=5)
    assert workspace.WINDOW_S == 40
    assert workspace.audio_workspace(audio, workspace.WINDOW_S) == pytest.approx(live.peak, rel=0.03)


def test_a_long_voice_that_does_not_fit_is_refused_before_anything_loads(sizes):
    def planned(work: Workload, ram_bytes: int) -> Plan:
        return plan(
            sizes("int8"), work, PlanOptions(offload_kv_cache=True, offload_model=True), vram_bytes=8 * GIB,
            ram_bytes=ram_bytes, card=CARDS["rtx4090"],
        )  # fmt: skip

    short, long = (planned(work, 64 * GIB) for work in (SHORT, LONG))
    assert long.peak_host_bytes - short.peak_host_bytes == long.host.voice_encoder > 1.2e9
    assert planned(SHORT, short.peak_host_bytes).fits
    with pytest.raises(DoesNotFit, match="of host memory needed at the least"):
        planned(LONG, long.peak_host_bytes - 1)


@pytest.mark.parametrize(
    ("duration", "counted"),
    [(None, True), ("61", True), ("1:00:00", True), ("60", False), ("0:45", False), ("9s", False)],
)
@pytest.mark.parametrize("gpus", [None, 2])
def test_the_command_counts_it_unless_the_voice_is_short(duration, counted, gpus):
    asked = ["plan", "--gpu", "rtx4090", "--size", "384*256", "--json", *(["--gpus", str(gpus)] if gpus else [])]
    done = CliRunner().invoke(main, [*asked, *(["--audio-duration", duration] if duration else [])])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    parts = found["machines"][0]["host_bytes"] if gpus else found["host_bytes"]
    assert (parts["voice_encoder"] > 0) == counted
    assert any("--audio-duration" in note for note in found["notes"]) == (duration is None)


def test_the_table_has_a_row_of_it():
    for more, counted in ([], True), (["--audio-duration", "20"], False), (["--gpus", "2"], True):
        done = CliRunner().invoke(main, ["plan", "--gpu", "rtx4090", "--size", "384*256", *more])
        assert ("for a long voice" in done.stdout) == counted


@pytest.mark.parametrize("duration", ["long", "0", "-3", "1:75", "nan"])
def test_a_duration_that_is_none(duration):
    done = CliRunner().invoke(main, ["plan", "--gpu", "rtx4090", f"--audio-duration={duration}"])
    assert done.exit_code == 2
    assert "--audio-duration is" in done.stderr


@pytest.mark.parametrize(
    ("seconds", "goes_on", "num_clip", "stays"),
    [
        (60, False, None, False),
        (61, False, None, True),
        (3600, False, None, True),
        (60, True, 1, False),
        (60, True, 7, False),
        (60, True, 8, True),
        (100, False, 2, False),
        (300, True, 100, True),
    ],
)
def test_a_run_knows_it_from_its_files(seconds, goes_on, num_clip, stays):
    request = Request(image=Path("none"), audio=Path("none"), prompt="", num_clip=num_clip)
    speech = np.zeros(seconds * 16000, np.float32)
    inputs = Inputs(request=request, portrait=torch.zeros(3, 64, 64), speech=speech, speech_goes_on=goes_on)
    assert inputs.voice_on_host == stays
