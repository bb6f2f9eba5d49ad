"""8-bit products as float32 ones: for a device whose 8-bit product is missing, slow or wrong.

int8 and fp8 (e4m3) are exact in float32, and so is each product of two of them; only sums round. int8: not at all
where the magnitudes of a row's products add up to 2^24 or less, which holds up to 1040 channels whatever the values
are; beyond that by K * 2^-24 of that sum at the most. fp8: by as much at any depth.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor

# Bytes of the weight that stand in float32 at once: as many as a processor's last cache holds of them, so that they
# are read from there, and nothing beside the memory of a streamed 14B layer (its largest weight takes 283 MB).
TILE_BYTES = 8 << 20


def wide_product(q_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """q @ weight.T of 8-bit operands in float32 [M, N]; the weight is widened a few output channels at a time."""
    q = q_MK.float()
    columns, depth = weight_NK.shape
    step = max(1, TILE_BYTES // (4 * max(1, depth)))
    if step >= columns:
        return q @ weight_NK.float().t()
    out = q.new_empty((len(q), columns))
    room = q.new_empty((step, depth))
    for start in range(0, columns, step):
        tile = weight_NK[start : start + step]
        torch.mm(q, room[: len(tile)].copy_(tile).t(), out=out[:, start : start + len(tile)])
    return out
