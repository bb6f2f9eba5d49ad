"""The VAE's norms and the SiLU behind them through one operation, into the memory that the convolution behind reads."""

from __future__ import annotations

import torch
from torch import nn

from lowvram_kernels.channel_norm import channel_norm_silu
from lowvram_models.vae_layers import ChannelNorm

Tensor = torch.Tensor


class FusedChannelNorm(ChannelNorm):
    """Computes what ``ChannelNorm`` does, from the same parameter under the same name. A processor keeps the models'
    own way, a few channels at a time."""

    def then_silu(self, x: Tensor, out: Tensor) -> None:
        if x.device.type == "cpu":
            super().then_silu(x, out)
            return
        for given, made in zip(x.unbind(0), out.unbind(0), strict=True):  # a part of several frames is no row of rows
            channel_norm_silu(_pixels(given), self.gamma.flatten(), _pixels(made))


def _pixels(x_CTHW: Tensor) -> Tensor:
    """[C, T, H, W], channels-last, as [pixels, C] in the same memory."""
    return x_CTHW.permute(1, 2, 3, 0).view(-1, x_CTHW.shape[0])


def fuse_vae(vae: nn.Module) -> None:
    """Swap it into a VAE, in place; parameters stay."""
    for module in vae.modules():
        if type(module) is ChannelNorm:
            module.__class__ = FusedChannelNorm
