"""Attention layers of the DiT. Shapes: L tokens, D width, N heads, H head_dim, F latent frames.

A layer projects and normalises; what the queries attend to is the business of the ``memory`` that the caller passes,
so that rings, sinks, their precision, place and split over ranks stay out of the mathematics.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from lowvram_models.rope import Rope

Tensor = torch.Tensor


class AttentionMemory(Protocol):
    """What self-attention reads from and writes to."""

    def attend(self, q_LNH: Tensor, k_LNH: Tensor, v_LNH: Tensor, rope: Rope) -> Tensor:
        """Take a block's queries, keys and values *before* RoPE; return the attended values [L, N, H]."""
        ...


class ScaledDotProduct(nn.Module):
    """softmax(q k^T / sqrt(H)) v over [..., L, N, H]; the operation a runtime swaps for its own."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(-3, -2)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the whole width, computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + self.eps)
        return (x32 * scale * self.weight.float()).to(x.dtype)


class _Projections(nn.Module):
    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class SelfAttention(_Projections):
    def forward(self, x_LD: Tensor, rope: Rope, memory: AttentionMemory) -> Tensor:
        """[L, D] -> [L, D]; ``memory`` applies RoPE, keeps the new keys and values, and attends."""
        q = self.split(self.norm_q(self.q(x_LD)))
        k = self.split(self.norm_k(self.k(x_LD)))
        v = self.split(self.v(x_LD))
        return self.o(memory.attend(q, k, v, rope).flatten(-2))


class CrossAttention(_Projections):
    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__(dim, num_heads, eps)
        self.attention: nn.Module = ScaledDotProduct()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[..., L, D] queries over [..., K, D] context -> [..., L, D]; leading dimensions are attended apart."""
        q = self.split(self.norm_q(self.q(x)))
        k = self.split(self.norm_k(self.k(context)))
        v = self.split(self.v(context))
        return self.o(self.attention(q, k, v).flatten(-2))
