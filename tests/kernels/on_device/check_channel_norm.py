"""Norm over a pixel's channels and SiLU in one pass, against float64."""

from __future__ import annotations

import pytest
import torch
from where import DEVICE, relative_error

from lowvram_kernels.channel_norm import reference_channel_norm_silu
from lowvram_kernels.triton_channel_norm import channel_norm_silu_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 8, 24, 96, 192, 384, 513])
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_rows_of_every_width(rows, channels, dtype):
    x = (torch.randn(rows, channels, device=DEVICE) * 5).to(dtype)
    gamma = torch.randn(channels, device=DEVICE).to(dtype)
    out = torch.full_like(x, float("nan"))
    assert channel_norm_silu_triton(x, gamma, out) is out
    exact = reference_channel_norm_silu(x.double(), gamma.double())
    assert relative_error(out, exact) < (3e-6 if dtype is torch.float32 else torch.finfo(dtype).eps)


def test_it_writes_its_own_rows_and_no_others():
    whole = torch.full((12, 96), 7.0, device=DEVICE)
    x, gamma = torch.randn(5, 96, device=DEVICE), torch.ones(96, device=DEVICE)
    channel_norm_silu_triton(x, gamma, whole[4:9])
    assert whole[:4].eq(7).all()
    assert whole[9:].eq(7).all()
    assert relative_error(whole[4:9], reference_channel_norm_silu(x.double(), gamma.double())) < 3e-6


def test_rows_that_lie_apart():
    wide = torch.randn(6, 200, device=DEVICE)
    x, out, gamma = wide[:, :96], torch.zeros(6, 160, device=DEVICE), torch.randn(96, device=DEVICE)
    channel_norm_silu_triton(x, gamma, out[:, 32:128])
    assert relative_error(out[:, 32:128], reference_channel_norm_silu(x.double(), gamma.double())) < 3e-6
    assert not out[:, :32].any()
    assert not out[:, 128:].any()


def test_in_place():
    x, gamma = torch.randn(9, 40, device=DEVICE), torch.randn(40, device=DEVICE)
    exact = reference_channel_norm_silu(x.double(), gamma.double())
    channel_norm_silu_triton(x, gamma, x)
    assert relative_error(x, exact) < 3e-6


def test_nothing_gives_nothing_and_nan_stays():
    x = torch.zeros(4, 96, device=DEVICE)
    x[1, 5] = float("nan")
    x[2, 7] = 1e-30
    out = torch.empty_like(x)
    channel_norm_silu_triton(x, torch.ones(96, device=DEVICE), out)
    assert not out[0].any()
    assert out[1].isnan().all()
    assert out[2:].isfinite().all()


def test_large_values_saturate_as_silu_does():
    x = torch.full((2, 16), -1.0, device=DEVICE)
    x[1] = 1.0
    gamma = torch.full((16,), 200.0, device=DEVICE)
    out = torch.empty_like(x)
    channel_norm_silu_triton(x, gamma, out)
    assert out[0].abs().max() < 1e-30
    assert torch.allclose(out[1], torch.full_like(out[1], 200.0))


def test_more_channels_than_it_has_room_for_are_refused():
    x = torch.zeros(1, 4097, device=DEVICE)
    with pytest.raises(ValueError, match="4097 channels; the kernel takes 4096"):
        channel_norm_silu_triton(x, torch.ones(4097, device=DEVICE), x)
