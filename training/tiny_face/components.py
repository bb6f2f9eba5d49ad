"""An encoder without training: the network's convolutions hold principal components, level by level.

Its residual branches are left at zero, so up to its last norm the encoder is linear. Each halving of the picture keeps
the leading components of 2 x 2 neighbours, each halving of time the means of two frames and, of the leading
components, their differences: so one frame alone, which is not halved in time, comes out as a still video does. The
latents' 16 components come in pairs K + s, K - s through the last norm and SiLU, whose difference is s nearly exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.tiny_face.vae import TrainableVAE

K = 10.0
"""The constant that the last norm sees, in deviations of a component."""
MEANS = (12, 12)
"""Of 16 channels, how many stay means of two frames at either halving of time."""
COMPONENTS = 16


@torch.no_grad()
def set_encoder(vae: TrainableVAE, clips: Tensor) -> None:
    """Set the encoder of ``vae`` by clips [B, 3, 1 + 8n, H, W] in [-1, 1]; latents get about mean 0 and deviation 1."""
    encoder = vae.vae.encoder
    for module in encoder.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            module.weight.zero_()
            module.bias.zero_()
    encoder.conv_in.weight[:3, :, -1, 1, 1] = torch.eye(3)
    down = encoder.down_blocks
    x = clips[:, :, 1:]
    x = _halve(down[2], x, 8)
    _pass(down[3].conv_shortcut)
    x = _halve_time(down[5], _halve(down[5], x, COMPONENTS), MEANS[0])
    _pass(down[6].conv_shortcut)
    x = _halve_pairs(down[8], x)
    x = _halve_pairs_in_time(down[8], x, MEANS[1])
    _unpair(vae, x)


def _pass(conv: torch.nn.Module) -> None:
    count = conv.weight.shape[1]
    conv.weight[:count, :, 0, 0, 0] = torch.eye(count)


def _neighbours(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [4 C, positions]: rows, columns, channels of 2 x 2 neighbours."""
    parts = [x[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return torch.cat(parts, dim=1).transpose(0, 1).flatten(1)


def _leading(values: Tensor, count: int) -> Tensor:
    """[count, channels]: principal components, the strongest first."""
    _, vectors = torch.linalg.eigh(torch.cov(values))
    return vectors.flip(1)[:, :count].T


def _halve(block: torch.nn.Module, x: Tensor, count: int) -> Tensor:
    """Components of neighbours into the convolution that halves the picture; what it makes of ``x``."""
    conv, channels = block.resample[1], x.shape[1]
    basis = _leading(_neighbours(x), count)
    _write(conv, basis, channels)
    return _apply(basis, x)


def _write(conv: torch.nn.Module, basis: Tensor, channels: int) -> None:
    taps = basis.unflatten(1, (2, 2, channels)).permute(0, 3, 1, 2)
    conv.weight[: len(basis), :channels, :2, :2] = taps


def _apply(basis: Tensor, x: Tensor) -> Tensor:
    parts = [x[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return torch.einsum("oc,bcthw->bothw", basis, torch.cat(parts, dim=1))


def _halve_time(block: torch.nn.Module, x: Tensor, means: int) -> Tensor:
    """Means of two frames, and in the place of the weakest components the differences of the strongest."""
    count = x.shape[1]
    weight = torch.zeros(count, count, 2)
    for channel in range(means):
        weight[channel, channel] = torch.tensor([0.5, 0.5])
    for channel in range(means, count):
        weight[channel, channel - means] = torch.tensor([-0.5, 0.5])
    block.time_conv.weight[:count, :count, 1:, 0, 0] = weight
    return _in_time(weight, x)


def _in_time(weight: Tensor, x: Tensor) -> Tensor:
    pairs = torch.stack([x[:, :, 0::2], x[:, :, 1::2]])
    return torch.einsum("oci,ibcthw->bothw", weight, pairs)


def _halve_pairs(block: torch.nn.Module, x: Tensor) -> Tensor:
    """The same as ``_halve``, each component of about unit size as K + s and K - s; returns s."""
    basis = _leading(_neighbours(x), COMPONENTS)
    s = _apply(basis, x)
    size = s.pow(2).mean(dim=(0, 2, 3, 4)).sqrt()
    basis, s = basis / size[:, None], s / size[:, None, None, None]
    signed = torch.stack([basis, -basis], dim=1).flatten(0, 1)
    _write(block.resample[1], signed, x.shape[1])
    block.resample[1].bias.fill_(K)
    return s


def _halve_pairs_in_time(block: torch.nn.Module, s: Tensor, means: int) -> Tensor:
    count = s.shape[1]
    weight = torch.zeros(count, count, 2)
    for channel in range(means):
        weight[channel, channel] = torch.tensor([0.5, 0.5])
    for channel in range(means, count):
        weight[channel, channel - means] = torch.tensor([-0.5, 0.5])
    made = _in_time(weight, s)
    size = made[:, means:].pow(2).mean(dim=(0, 2, 3, 4)).sqrt()
    weight[means:] /= size[:, None, None]
    conv = block.time_conv
    for channel in range(count):
        for sign, row in ((1.0, 2 * channel), (-1.0, 2 * channel + 1)):
            if channel < means:
                conv.weight[row, row, 1:, 0, 0] = 0.5
                continue
            source = 2 * (channel - means)
            # Both members of the source's pair, whose constants cancel each other.
            conv.weight[row, source, 1:, 0, 0] = sign * weight[channel, channel - means] / 2
            conv.weight[row, source + 1, 1:, 0, 0] = -sign * weight[channel, channel - means] / 2
            conv.bias[row] = K
    return _in_time(weight, s)


def _unpair(vae: TrainableVAE, s: Tensor) -> None:
    """The last convolution takes the members of each pair from each other, centred and scaled."""
    count = s.shape[1]
    pairs = torch.stack([K + s, K - s], dim=2).flatten(1, 2)
    encoder = vae.vae.encoder
    encoder.norm_out.gamma.fill_(1.0)
    y = torch.nn.functional.silu(encoder.norm_out(pairs)).unflatten(1, (count, 2))
    differences = y[:, :, 0] - y[:, :, 1]
    mean = differences.mean(dim=(0, 2, 3, 4))
    std = (differences - mean[:, None, None, None]).pow(2).mean(dim=(0, 2, 3, 4)).sqrt()
    for channel in range(count):
        encoder.conv_out.weight[channel, 2 * channel, -1, 1, 1] = 1.0 / std[channel]
        encoder.conv_out.weight[channel, 2 * channel + 1, -1, 1, 1] = -1.0 / std[channel]
        encoder.conv_out.bias[channel] = -mean[channel] / std[channel]
    quant = vae.vae.quant_conv
    quant.weight.zero_()
    quant.bias.zero_()
    quant.weight[:count, :count, 0, 0, 0] = torch.eye(count)
