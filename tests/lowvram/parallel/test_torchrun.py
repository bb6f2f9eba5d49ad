"""The two commands that users of the reference quote, as they stand, on the tiny model."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lowvram.media.samples import draw_portrait
from lowvram.media.video import probe

FOUR = (
    '--nproc_per_node=4 -m lowvram infer --num_gpus_dit 3 --ulysses_size 3 --size "688*368" --infer_frames 32 '
    "--sample_steps 4 --enable_vae_parallel --enable_online_decode"
)
FIVE = (
    '--nproc_per_node=5 -m lowvram infer --num_gpus_dit 4 --ulysses_size 4 --size "720*400" --infer_frames 32 '
    "--sample_steps 4 --enable_vae_parallel --enable_online_decode"
)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "ranks"), [(FOUR, 4), (FIVE, 5)])
def test_the_quoted_commands_run_as_they_stand(tiny, tmp_path, command, ranks):
    draw_portrait(128, 192).save(tmp_path / "portrait.png")
    files = ("--model", tiny.artifact("int8"), "--image", tmp_path / "portrait.png", "--audio", tiny.voice)
    made = ("--prompt", "A person speaks", "--num_clip", "1", "--out", tmp_path / "out.mp4", "--device", "cpu")
    report = tmp_path / "report.json"
    done = subprocess.run(
        [Path(sys.executable).parent / "torchrun", *shlex.split(command), *files, *made, "--report", report],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(tmp_path / "out.mp4")]  # the writing rank alone says it
    facts = json.loads(report.read_text())
    assert [rank["rank"] for rank in facts["ranks"]] == list(range(ranks))
    assert facts["layout"] == {"num_gpus_dit": ranks - 1, "ulysses_size": ranks - 1, "vae_rank": True}
    assert facts["frames"] == 32 - 3
    assert probe(tmp_path / "out.mp4")["frames"] == 29
