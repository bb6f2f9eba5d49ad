"""What can go wrong between host and device. No GPU is needed: the parts that speak to one are replaced."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowvram.infer import infer
from lowvram.offload import copy_engine as engine_module
from lowvram.offload.placement import MemoryOptions, Placement
from lowvram.outputs import Outputs
from lowvram.pipeline import AvatarPipeline
from lowvram_kernels.errors import DeviceError, OutOfMemoryError
from lowvram_models.dit import CausalDiT


def test_a_copy_that_fails_ends_the_run_with_the_blocks_that_were_made(tiny, tmp_path, monkeypatch, caplog):
    """All layers and rings are copied; one copy in the second clip fails as a lost device does."""
    real, count = torch.Tensor.copy_, iter(range(10**9))
    layers, steps = 4, 2
    cells = tuple((step, layer) for step in range(steps) for layer in range(layers))
    placement = Placement(streamed_layers=tuple(range(layers)), host_rings=cells)
    pipeline = AvatarPipeline.from_artifact(
        tiny.artifact("fp32"), device="cpu", memory=MemoryOptions(placement=placement)
    )

    def copy_in(dst: torch.Tensor, src: torch.Tensor, after) -> object:
        if next(count) == 60:
            raise RuntimeError("CUDA error: unspecified launch failure")
        real(dst, src)
        return engine_module.DONE

    monkeypatch.setattr(pipeline.runtime.engine, "_copy_in", copy_in)
    out = tmp_path / "out.mp4"
    with pytest.raises(DeviceError, match=r"a copy of .* bytes to the device failed .*launch failure.*is kept"):
        infer(pipeline, tiny.request(), Outputs(video=out), quiet=True)
    assert not out.exists()
    assert out.with_name("out.partial.mp4").stat().st_size > 1000
    assert any("unfinished video left" in record.getMessage() for record in caplog.records)


def test_quality_goes_where_it_may(tiny, tmp_path, monkeypatch, caplog):
    """Memory for clips of 12 frames only: the video is begun again, and says so."""
    real = CausalDiT.embed_audio

    def embed(self, audio):
        if audio.shape[-1] == 4:  # the shorter block of a clip of 16 frames
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return real(self, audio)

    monkeypatch.setattr(CausalDiT, "embed_audio", embed)
    for allowed in (False, True):
        memory = MemoryOptions(allow_quality_loss=allowed)
        pipeline = AvatarPipeline.from_artifact(tiny.artifact("fp32"), device="cpu", memory=memory)
        out = Outputs(video=tmp_path / f"{allowed}.mp4", report=tmp_path / f"{allowed}.json")
        if allowed:
            report = infer(pipeline, tiny.request(), out, quiet=True)
        else:
            with pytest.raises(OutOfMemoryError, match="nothing is left"):
                infer(pipeline, tiny.request(), out, quiet=True)
    assert report["quality_lost"] == ["clips of 12 frames instead of 16"]
    assert report["settings"]["infer_frames"] == 12
    assert np.isfinite(report["frames_per_second"])
    assert out.video.stat().st_size > 1000
    assert any("begun again with clips of 12 frames" in record.getMessage() for record in caplog.records)
