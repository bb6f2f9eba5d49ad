"""Channels-last, the order of the VAE's activations and weights: all channels of a pixel lie side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensor = torch.Tensor


def last_of(x: Tensor) -> torch.memory_format:
    """What PyTorch calls the order, of four or of five dimensions."""
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def channels_last(x: Tensor) -> Tensor:
    """x of four or five dimensions with the channels of a pixel side by side; in its own memory where they lie so."""
    x = x.contiguous(memory_format=last_of(x))
    # The step of a dimension of one element leads nowhere, and may be any. PyTorch asks it all the same when it chooses
    # an order for what an operation makes.
    steps = steps_of(x.shape)
    return x if x.stride() == steps else x.as_strided(x.shape, steps)


def steps_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor of that shape that is channels-last."""
    steps, step = [0] * len(shape), 1
    for dim in (1, *range(len(shape) - 1, 1, -1), 0):
        steps[dim], step = step, step * shape[dim]
    return tuple(steps)


def pictures(x: Tensor) -> Tensor:
    """Frames [B, C, T, H, W] as pictures [B T, C, H, W] in the same memory."""
    return channels_last(x.transpose(1, 2).flatten(0, 1))


def frames(x: Tensor, batch: int) -> Tensor:
    """Pictures [B T, C, H, W] as frames [B, C, T, H, W] in the same memory."""
    return channels_last(x.unflatten(0, (batch, -1)).transpose(1, 2))
