from __future__ import annotations

import json

import numpy as np
import pytest

import lowvram.batch.run as run_module
from lowvram.media.video import VideoWriter
from lowvram_kernels.errors import OutOfMemoryError


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Instead of the model something that writes half a second of video, and says of what. Some prompts end it."""
    names: list[str] = []

    def infer(pipeline, request, outputs, *, quiet, noted):
        outputs.check()
        names.append(outputs.video.name)
        if request.prompt == "fail":
            raise OutOfMemoryError("it does not fit")
        if request.prompt == "crash":
            raise ValueError("nobody expected this")
        if request.prompt == "stop":
            (outputs.video.parent / f"{outputs.video.stem}.partial.mp4").write_bytes(b"begun")
            raise KeyboardInterrupt
        with outputs.claimed(), VideoWriter(outputs.video, 64, 64) as writer:
            writer.write(np.zeros((12, 64, 64, 3), np.uint8))
        report = {"frames_written": 12, "fragmented": False, "frames_per_second": 2.0, **noted}
        outputs.report.write_text(json.dumps(report))
        return report

    monkeypatch.setattr(run_module, "infer", infer)
    return names
