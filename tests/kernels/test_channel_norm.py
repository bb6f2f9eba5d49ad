"""The VAE's norm with SiLU as an operation: what it refuses, and that the models' own layers compute the same."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowvram.loading.fused_vae import FusedChannelNorm, fuse_vae
from lowvram_kernels.channel_norm import channel_norm_silu, reference_channel_norm_silu
from lowvram_kernels.trace import trace_kernels
from lowvram_models.vae import StreamingVAE, build_vae
from lowvram_models.vae_layers import ChannelNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels", [1, 8, 96])
def test_is_normalize_scale_and_silu(channels, dtype):
    torch.manual_seed(0)
    x, gamma = torch.randn(11, channels, dtype=dtype), torch.randn(channels, dtype=dtype)
    out = torch.empty_like(x)
    with trace_kernels() as counts:
        assert channel_norm_silu(x, gamma, out) is out
    expected = F.silu(F.normalize(x.double(), dim=1) * channels**0.5 * gamma.double())
    assert (out.double() - expected).norm() / expected.norm() < 2 * torch.finfo(dtype).eps
    assert dict(counts) == {("channel_norm_silu", "torch"): 1}


@pytest.mark.parametrize(
    ("x", "gamma", "out", "error", "said"),
    [
        (torch.zeros(2, 3), torch.ones(4), torch.zeros(2, 3), ValueError, r"gamma \(4,\)"),
        (torch.zeros(2, 3), torch.ones(3), torch.zeros(3, 3), ValueError, r"out \(3, 3\)"),
        (torch.zeros(2, 3, 1), torch.ones(3), torch.zeros(2, 3, 1), ValueError, r"expected \[R, C\]"),
        (torch.zeros(3, 2).t(), torch.ones(3), torch.zeros(2, 3), ValueError, "channels of x are 2 apart"),
        (torch.zeros(2, 3), torch.ones(3), torch.zeros(3, 2).t(), ValueError, "of out 2; expected 1"),
        (torch.zeros(2, 3).int(), torch.ones(3), torch.zeros(2, 3), TypeError, "x is torch.int32"),
    ],
)
def test_what_does_not_fit_is_refused(x, gamma, out, error, said):
    with pytest.raises(error, match=said):
        channel_norm_silu(x, gamma, out)


def test_no_pixels_are_no_work():
    empty = torch.zeros(0, 8)
    assert channel_norm_silu(empty, torch.ones(8), empty.clone()).shape == (0, 8)


def test_only_the_models_own_norms_are_swapped_and_parameters_stay():
    vae = build_vae(base_dim=4)
    before = {name: parameter.data_ptr() for name, parameter in vae.named_parameters()}
    fuse_vae(vae)
    assert {name: parameter.data_ptr() for name, parameter in vae.named_parameters()} == before
    kinds = [type(module) for module in vae.modules()]
    assert FusedChannelNorm in kinds
    assert ChannelNorm not in kinds


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("frames", [1, 3])
def test_rows_are_the_pixels_in_the_memory_that_the_convolution_reads(monkeypatch, batch, frames):
    """As on a GPU, with the operation's PyTorch form."""
    torch.manual_seed(0)
    norm = ChannelNorm(8, images=False)
    norm.gamma.data.normal_()
    x = torch.randn(batch, 8, frames, 3, 5).contiguous(memory_format=torch.channels_last_3d)
    room = torch.full((batch, 8, 2 + frames, 3, 5), 3.0).contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        expected = F.silu(norm(x))
        for given, made in zip(x, room[:, :, 2:], strict=True):
            rows = [t.permute(1, 2, 3, 0).view(-1, 8) for t in (given, made)]  # raises where that would be a copy
            channel_norm_silu(rows[0], norm.gamma.flatten(), rows[1])
    assert torch.allclose(room[:, :, 2:], expected, atol=1e-6)
    assert room[:, :, :2].eq(3).all()


def test_a_decoder_on_another_device_goes_through_it(monkeypatch):
    """Of the small VAE's decode on ``meta``, every norm but the attention's, which has no SiLU behind it."""
    with torch.device("meta"):
        vae = build_vae(base_dim=4).bfloat16()
    fuse_vae(vae)
    decoder = StreamingVAE(vae, dtype=torch.bfloat16).start_decoder()
    norms = sum(isinstance(m, ChannelNorm) for m in vae.decoder.modules())
    with trace_kernels() as counts:
        decoder._run(torch.empty(16, 1, 8, 8, device="meta"))
    assert sum(n for (name, _), n in counts.items() if name == "channel_norm_silu") == norms - 1


def test_its_reference_in_float64_is_exact():
    x = torch.randn(5, 7, dtype=torch.float64)
    found = reference_channel_norm_silu(x, torch.ones(7, dtype=torch.float64))
    norm = x.square().sum(1, keepdim=True).sqrt()
    expected = x / norm * 7**0.5
    assert torch.allclose(found, expected / (1 + torch.exp(-expected)), rtol=1e-14)
