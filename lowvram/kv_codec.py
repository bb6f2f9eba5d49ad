"""How keys and values of one block lie in memory: as they are, or in 8 bit.

A block of n tokens is one stretch of bytes, so that it crosses PCIe in one copy. Plain: keys [n, N, H], values
[n, N, H] in the dtype that is computed in. Int8: keys and values int8, then their scales bfloat16 [n, N] each, then
the mean that was taken out of the keys, bfloat16 [N, H]. Shapes: N heads, H head_dim.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

Tensor = torch.Tensor
# bfloat16 keeps 8 bits: rounded up by this, a scale is never below amax / 127 after it was rounded to nearest.
_ROUND_UP = 1 + 2.0**-8
_LEAST_SCALE = 1e-30  # of a row of zeros


class KVCodec(Protocol):
    def nbytes(self, tokens: int) -> int:
        """Bytes of a block of that many tokens."""
        ...

    def encode(self, block: Tensor, k_LNH: Tensor, v_LNH: Tensor) -> None:
        """Write keys and values into ``block``, uint8 with at least ``nbytes(L)`` bytes."""
        ...

    def decode(self, block: Tensor, k_LNH: Tensor, v_LNH: Tensor) -> None:
        """Read them back into ``k`` and ``v``."""
        ...


class PlainCodec:
    """Keys and values in ``dtype``."""

    def __init__(self, heads: int, head_dim: int, dtype: torch.dtype):
        self._shape, self._dtype = (heads, head_dim), dtype

    def nbytes(self, tokens: int) -> int:
        return 2 * tokens * math.prod(self._shape) * self._dtype.itemsize

    def encode(self, block: Tensor, k_LNH: Tensor, v_LNH: Tensor) -> None:
        for part, values in zip(self._parts(block, len(k_LNH)), (k_LNH, v_LNH), strict=True):
            part.copy_(values)

    def decode(self, block: Tensor, k_LNH: Tensor, v_LNH: Tensor) -> None:
        for part, out in zip(self._parts(block, len(k_LNH)), (k_LNH, v_LNH), strict=True):
            out.copy_(part)

    def _parts(self, block: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        k, v = block[: self.nbytes(tokens)].view(self._dtype).view(2, tokens, *self._shape)
        return k, v


class Int8Codec:
    """Symmetric int8 with a scale a token and head. Keys lose their mean over the block's tokens first, channel by
    channel: keys of one head have channels that are far from zero on every token, and would set the scale alone."""

    def __init__(self, heads: int, head_dim: int):
        self._heads, self._head_dim = heads, head_dim

    def nbytes(self, tokens: int) -> int:
        return 2 * tokens * self._heads * (self._head_dim + 2) + 2 * self._heads * self._head_dim

    def encode(self, block: Tensor, k_LNH: Tensor, v_LNH: Tensor) -> None:
        k8, v8, k_scale, v_scale, mean = self.parts(block, len(k_LNH))
        mean.copy_(k_LNH.mean(dim=0, dtype=torch.float32))
        _quantize(k_LNH.float() - mean.float(), k8, k_scale)
        _quantize(v_LNH.float(), v8, v_scale)

    def decode(self, block: Tensor, k_LNH: Tensor, v_LNH: Tensor) -> None:
        k8, v8, k_scale, v_scale, mean = self.parts(block, len(k_LNH))
        k_LNH.copy_((k8.float() * k_scale.float()[..., None]).add_(mean.float()))
        v_LNH.copy_(v8.float() * v_scale.float()[..., None])

    def parts(self, block: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Views of a block: keys and values int8 [n, N, H], their scales bfloat16 [n, N], mean bfloat16 [N, H]."""
        heads, width = self._heads, self._head_dim
        values, scales = tokens * heads * width, 2 * tokens * heads
        k, v, k_scale, v_scale, mean = block[: self.nbytes(tokens)].split(
            [values, values, scales, scales, 2 * heads * width]
        )
        return (
            k.view(torch.int8).view(tokens, heads, width),
            v.view(torch.int8).view(tokens, heads, width),
            k_scale.view(torch.bfloat16).view(tokens, heads),
            v_scale.view(torch.bfloat16).view(tokens, heads),
            mean.view(torch.bfloat16).view(heads, width),
        )


def _quantize(x_LNH: Tensor, out: Tensor, scale_LN: Tensor) -> None:
    """Quantize ``x`` into ``out`` with the scale as it is stored."""
    scale_LN.copy_(x_LNH.abs().amax(dim=-1).mul_(_ROUND_UP / 127).clamp_min_(_LEAST_SCALE))
    out.copy_((x_LNH / scale_LN.float()[..., None]).round_())


def kv_codec(scheme: str, heads: int, head_dim: int, dtype: torch.dtype) -> KVCodec:
    """``scheme`` "plain" or "int8"; ``dtype`` is what is computed in."""
    return Int8Codec(heads, head_dim) if scheme == "int8" else PlainCodec(heads, head_dim, dtype)
