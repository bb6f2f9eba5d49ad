"""The residual on its way through the layers, with what the last part of a layer gave still to be added to it.

The sum is made by the pass that norms it for the next layer, so that between two products every number of the residual
is read once and written once, also from one layer to the next and around the audio injection.
Shapes: L tokens of F groups, D width.
"""

from __future__ import annotations

import torch

from lowvram_kernels.norm import add_gated, add_gated_norm_rows, norm_rows

Tensor = torch.Tensor


class Residual:
    """x + gate * y: x [L, D] float32, y [L, D] or None for nothing, gate [D] or [F, D] float32 or None for 1.

    It is taken once: whoever reads it may change x, and lets go of y.
    """

    def __init__(self, x_LD: Tensor, y_LD: Tensor | None = None, gate: Tensor | None = None):
        self._parts: tuple[Tensor, Tensor | None, Tensor | None] | None = (x_LD, y_LD, gate)

    def take(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x, y and gate, which are gone from here then. Raises: RuntimeError the second time."""
        parts, self._parts = self._parts, None
        if parts is None:
            raise RuntimeError("this residual was taken already; its parts may have been changed since")
        return parts


def joined(residual: Tensor | Residual) -> Tensor:
    """[L, D] float32, the sum made; a tensor as it is."""
    if isinstance(residual, Tensor):
        return residual
    x, y, gate = residual.take()
    return x if y is None else add_gated(x, y, gate, out=x)


def normed(
    residual: Tensor | Residual, gain: Tensor, offset: Tensor, *, eps: float, dtype: torch.dtype, group: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The residual [L, D] with its sum made, and ``norm_rows`` of it: values and scale. A tensor is not changed."""
    x, y, gate = (residual, None, None) if isinstance(residual, Tensor) else residual.take()
    if y is None:
        return (x, *norm_rows(x, gain, offset, eps=eps, dtype=dtype, group=group))
    return add_gated_norm_rows(x, y, gate, gain, offset, eps=eps, dtype=dtype, group=group, out=x)
