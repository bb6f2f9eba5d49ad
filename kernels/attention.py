"""Attention over plain keys and values: ``scaled_dot_product_attention``, which chooses among PyTorch's own kernels;
another library's where the selftest found it as right, and faster.

Keys and values that are held in 8 bits have their own operation, ``ring_attention``.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lowvram_kernels.choices import TORCH, choose
from lowvram_kernels.libraries import attend
from lowvram_kernels.trace import record

Tensor = torch.Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(H)) v, without a mask: q [..., L, N, H], k and v [..., S, N, H] -> [..., L, N, H].

    Raises:
        ValueError: shapes do not fit or there is no key.
    """
    if k.shape != v.shape or k.shape[-2:] != q.shape[-2:] or k.shape[-3] == 0:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected [..., tokens, heads, head_dim] with "
            "equal heads and head_dim, and at least one key"
        )
    dtype, backend = str(q.dtype).removeprefix("torch."), choose("attention", q.device)
    if backend == TORCH or q.dtype is torch.float32:  # others take 16 bits only
        record("attention", f"{dtype}: torch scaled_dot_product_attention")
        return sdpa(q, k, v)
    record("attention", f"{dtype}: {backend}")
    return library_sdpa(backend, q, k, v)


def library_sdpa(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As ``attention``, by one of ``choices.RIVALS``."""
    four = [t.reshape(-1, *t.shape[-3:]) for t in (q, k, v)]
    return attend(backend, *four).reshape(q.shape)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same without checks and without a word to the trace."""
    # Four dimensions, because with three the fused backends are passed over and the scores stand in memory as a whole.
    shape = q.shape
    if len(shape) == 3:
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
    q, k, v = (t.reshape(-1, *t.shape[-3:]).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(shape)
