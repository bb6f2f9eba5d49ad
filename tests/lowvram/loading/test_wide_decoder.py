"""The VAE's decoder, widened once: the frames that its 8-bit weights give when they are widened at every use."""

from __future__ import annotations

import pytest
import torch

from lowvram.loading.encoders import load_decoder, load_vae
from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.format import Artifact, Component
from tests.quantize.checkpoints import refusal
from tests.quantize.test_channels_last import older

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype", "old"),
    [
        ("int8", torch.float32, False),
        ("int8", torch.float32, True),
        ("int8", torch.bfloat16, False),
        ("fp8", torch.float32, False),
        ("fp8", torch.bfloat16, True),
        ("bf16", torch.float32, False),
    ],
)
def test_frames_are_the_same_to_the_bit(tiny, tmp_path, precision, dtype, old):
    path = tiny.artifact(precision)
    artifact = Artifact.open(older(path, tmp_path / "old") if old else path)
    latent = torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    wide, stored = load_decoder(artifact, CPU, dtype), load_vae(artifact, CPU, dtype)
    frames = [vae.start_decoder().decode(latent) for vae in (wide, stored)]
    assert torch.equal(*frames)
    decoder = dict(wide.vae.decoder.named_parameters()) | dict(wide.vae.post_quant_conv.named_parameters())
    assert {parameter.dtype for parameter in decoder.values()} == {dtype}
    assert all(parameter.is_meta for parameter in wide.vae.encoder.parameters())  # it takes no memory
    for name, parameter in decoder.items():
        if parameter.ndim == 5 and name.endswith("weight"):
            assert parameter.is_contiguous(memory_format=torch.channels_last_3d), name


def test_a_tensor_that_is_not_there_is_said(tiny, monkeypatch):
    views = Component.views

    def without(self, slab, buffer):
        return {name: view for name, view in views(self, slab, buffer).items() if name != "decoder.conv_out.weight"}

    monkeypatch.setattr(Component, "views", without)
    with refusal(CheckpointError, "vae.safetensors", "lacks 1 tensors", "decoder.conv_out.weight", "convert again"):
        load_decoder(Artifact.open(tiny.artifact("int8")), CPU, torch.float32)
