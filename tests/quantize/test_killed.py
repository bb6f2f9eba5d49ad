"""A conversion that is killed outright: nothing looks finished, and the next run goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from lowvram_quantize.convert import convert
from tests.quantize.checkpoints import contents, journaled, tensors_left

CHILD = """
import sys, time
from lowvram_quantize.convert import convert
checkpoint, out, lora = sys.argv[1:]
convert(checkpoint, out, lora=lora, lora_alpha=2.0, progress=lambda *_: time.sleep(0.01))
"""


@pytest.mark.slow
def test_a_killed_run_is_continued(tiny, written, tmp_path):
    out = tmp_path / "out"
    journal = out.with_name("out.partial") / "dit.safetensors.journal"
    args = [sys.executable, "-c", CHILD, str(tiny.checkpoint), str(out), str(tiny.lora)]
    child = subprocess.Popen(args, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        # A fingerprint and three slabs: the next slab takes the child a third of a second.
        while not journal.exists() or journal.read_text().count("\n") < 4:
            assert child.poll() is None, "the child ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    finished = journaled(journal.parent)
    # In the order of the source's files, which have what is not in layers behind them.
    assert len(finished["dit"]) >= 3
    assert not finished["dit"] >= {"layer.3"}
    convert(tiny.checkpoint, out, lora=tiny.lora, lora_alpha=2.0)
    assert len(written) == tensors_left(out, finished) > 0
    assert contents(out) == contents(tiny.artifact("int8"))
