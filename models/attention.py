"""Attention layers of the DiT. Shapes: L tokens, D width, N heads, H head_dim, F latent frames.

A layer projects and normalises; what the queries attend to is the business of the ``memory`` that the caller passes,
so that rings, sinks, their precision, place and split over ranks stay out of the mathematics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from lowvram_models.rope import Rope, apply_rope

Tensor = torch.Tensor
# A block's queries or keys [L, N, H], normed, rotated by the rope given; with None as they are before RoPE: so the sink
# keeps its keys.
Heads = Callable[[Rope | None], Tensor]


class AttentionMemory(Protocol):
    """What self-attention reads from and writes to."""

    def attend(self, queries: Heads, keys: Heads, v_LNH: Tensor, rope: Rope) -> Tensor:
        """Take a block's queries and keys, which ``rope`` rotates, and values; return the attended values [L, N, H]."""
        ...


class ScaledDotProduct(nn.Module):
    """softmax(q k^T / sqrt(H)) v over [..., L, N, H]; the operation a runtime swaps for its own."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(-3, -2)


class HeadNorm(nn.Module):
    """Root-mean-square norm over the whole width, in float32; splits in heads, and rotates where a rope is given."""

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        """[..., L, D] -> [..., L, N, H] in the same dtype; with a rope, which is for [L, D] only, rotated."""
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + self.eps)
        x = (x32 * scale * self.weight.float()).to(x.dtype).unflatten(-1, (self.num_heads, -1))
        return x if rope is None else apply_rope(x, rope)


class _Projections(nn.Module):
    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (HeadNorm(dim, num_heads, eps) for _ in range(2))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class SelfAttention(_Projections):
    def forward(self, x_LD: Tensor, rope: Rope, memory: AttentionMemory) -> Tensor:
        """[L, D] -> [L, D]; ``memory`` keeps the new keys and values, and attends."""
        return self.attend(self.q(x_LD), self.k(x_LD), self.v(x_LD), rope, memory)

    def attend(self, q_LD: Tensor, k_LD: Tensor, v_LD: Tensor, rope: Rope, memory: AttentionMemory) -> Tensor:
        """The same behind the three projections."""
        queries, keys = (functools.partial(norm, x) for norm, x in ((self.norm_q, q_LD), (self.norm_k, k_LD)))
        return self.o(memory.attend(queries, keys, self.split(v_LD), rope).flatten(-2))


class CrossAttention(_Projections):
    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__(dim, num_heads, eps)
        self.attention: nn.Module = ScaledDotProduct()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[..., L, D] queries over [..., K, D] context -> [..., L, D]; leading dimensions are attended apart."""
        return self.attend(self.q(x), context)

    def attend(self, q: Tensor, context: Tensor) -> Tensor:
        """The same behind the projection of the queries."""
        k = self.norm_k(self.k(context))
        v = self.split(self.v(context))
        return self.o(self.attention(self.norm_q(q), k, v).flatten(-2))
