"""RMSNorm of queries and keys over the whole width, with rotary position embedding in the same pass.

Order of preference: Triton on CUDA from sm_80 on, otherwise PyTorch. Source: model-spec sections 4 (norm) and 5 (RoPE).
"""

from __future__ import annotations

import dataclasses

import torch

from lowvram_kernels.choices import TRITON, choose
from lowvram_kernels.trace import record

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Projection:
    """Queries or keys before their RMSNorm: [T, D], the norm's weight [D] and its epsilon."""

    x_TD: Tensor
    weight_D: Tensor
    eps: float


def norm_rope(
    x_TD: Tensor, weight_D: Tensor, eps: float, heads: int, cos_TP: Tensor | None = None, sin_TP: Tensor | None = None
) -> Tensor:
    """RMSNorm over D, then RoPE a head: [T, D] -> [T, heads, D / heads], dtype of ``x``; float32 inside, rounded once.

    ``cos`` and ``sin`` float32 [T, D / heads / 2]; without them (condition keys) nothing is rotated.

    Raises:
        ValueError: shapes do not fit.
    """
    check_norm_rope(x_TD, weight_D, heads, cos_TP, sin_TP)
    if len(x_TD) and choose("norm_rope", x_TD.device) == TRITON:
        from lowvram_kernels.triton_rope import norm_rope_triton

        record("norm_rope", "triton")
        return norm_rope_triton(x_TD, weight_D, eps, heads, cos_TP, sin_TP)
    record("norm_rope", "torch")
    return reference_norm_rope(x_TD, weight_D, eps, heads, cos_TP, sin_TP)


def norm_both(first: Projection, second: Projection, heads: int) -> tuple[Tensor, Tensor]:
    """``norm_rope`` of queries and of keys that are not rotated, in one launch where there is one.

    Raises:
        ValueError: shapes do not fit.
    """
    for one in (first, second):
        check_norm_rope(one.x_TD, one.weight_D, heads, None, None)
    alike = first.x_TD.dtype is second.x_TD.dtype and first.weight_D.dtype is second.weight_D.dtype
    alike = alike and first.x_TD.shape[1] == second.x_TD.shape[1]
    if alike and len(first.x_TD) and len(second.x_TD) and choose("norm_rope", first.x_TD.device) == TRITON:
        from lowvram_kernels.triton_rope import norm_both_triton

        record("norm_rope", "triton", 2)
        return norm_both_triton(first, second, heads)
    q, k = (norm_rope(one.x_TD, one.weight_D, one.eps, heads) for one in (first, second))
    return q, k


def check_norm_rope(x_TD: Tensor, weight_D: Tensor, heads: int, cos_TP: Tensor | None, sin_TP: Tensor | None) -> None:
    """Raises: ValueError where the shapes do not fit."""
    if x_TD.ndim != 2 or weight_D.shape != x_TD.shape[1:] or x_TD.shape[1] % (2 * heads):
        raise ValueError(
            f"x {tuple(x_TD.shape)}, weight {tuple(weight_D.shape)}, {heads} heads: expected [T, D], [D] and an even "
            "number of channels a head"
        )
    table = (len(x_TD), x_TD.shape[1] // heads // 2)
    if (cos_TP is None) != (sin_TP is None) or any(t is not None and t.shape != table for t in (cos_TP, sin_TP)):
        raise ValueError(f"cos and sin have to be both {table}, a rotation for each token and pair, or both None")


def reference_norm_rope(
    x_TD: Tensor, weight_D: Tensor, eps: float, heads: int, cos_TP: Tensor | None = None, sin_TP: Tensor | None = None
) -> Tensor:
    x = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps) * weight_D
    x = x.unflatten(1, (heads, -1))
    return (x if cos_TP is None or sin_TP is None else rotate(x, cos_TP, sin_TP)).to(x_TD.dtype)


def rotate(x_TNH: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Rotate neighbouring pairs of channels, [T, N, H] by [T, H / 2]."""
    even, odd = x_TNH.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_TP[:, None], sin_TP[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
