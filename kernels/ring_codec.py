"""The 8-bit form of a block's keys and values, as the KV rings hold it and attention reads it.

A slot is one stretch of bytes: k, v int8 [tokens, heads, head_dim], k_scale, v_scale bfloat16 [tokens, heads] and
k_mean bfloat16 [heads, head_dim], where k = k_int8 * k_scale + k_mean and v = v_int8 * v_scale. Keys of a head lie
around a common vector that would set the scale alone; softmax sees the same scores once q . k_mean is added back for
the keys of the block.

Order of preference: Triton on CUDA from sm_80 on, otherwise PyTorch.
"""

from __future__ import annotations

import dataclasses

import torch

from lowvram_kernels.choices import TRITON, choose
from lowvram_kernels.rope import rotate
from lowvram_kernels.rows import FLOOR
from lowvram_kernels.trace import record

Tensor = torch.Tensor

# A step over the largest magnitude, a little more than 1 / 127: rounded to bfloat16 (8 bits) it is still not less.
STEP = (1 + 2.0**-8) / 127


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVBlock:
    """Encoded keys and values of T tokens: views into a slot, or tensors of their own.

    ``k``, ``v`` int8 [T, N, H]; ``k_scale``, ``v_scale`` bfloat16 [T, N]; ``k_mean`` bfloat16 [N, H]; all contiguous.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor
    v_scale: Tensor
    k_mean: Tensor

    @property
    def tokens(self) -> int:
        return len(self.k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotLayout:
    """Where the parts of a block of ``tokens`` lie. ``head_dim`` is even, so that every part is aligned."""

    tokens: int
    heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.heads < 1 or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"{self}: expected at least one token and head, and an even head_dim (pairs are rotated)")

    @property
    def nbytes(self) -> int:
        return 2 * self._payload + 4 * self.tokens * self.heads + 2 * self.heads * self.head_dim

    @property
    def _payload(self) -> int:
        return self.tokens * self.heads * self.head_dim

    def block(self, slot: Tensor) -> KVBlock:
        """Views of the first ``nbytes`` of a slot, uint8 [at least nbytes].

        Raises:
            ValueError: the slot is not contiguous bytes, or too few.
        """
        if slot.dtype is not torch.uint8 or slot.ndim != 1 or slot.numel() < self.nbytes or not slot.is_contiguous():
            raise ValueError(
                f"slot is {slot.dtype} {tuple(slot.shape)} with strides {slot.stride()}; expected contiguous uint8 "
                f"[{self.nbytes}] or more"
            )
        scales, shape = 2 * self.tokens * self.heads, (self.tokens, self.heads)
        k, v, k_scale, v_scale, k_mean = slot[: self.nbytes].split(
            [self._payload, self._payload, scales, scales, 2 * self.heads * self.head_dim]
        )
        return KVBlock(
            k=k.view(torch.int8).view(*shape, self.head_dim),
            v=v.view(torch.int8).view(*shape, self.head_dim),
            k_scale=k_scale.view(torch.bfloat16).view(shape),
            v_scale=v_scale.view(torch.bfloat16).view(shape),
            k_mean=k_mean.view(torch.bfloat16).view(self.heads, self.head_dim),
        )


def encode_block(k_TNH: Tensor, v_TNH: Tensor, out: KVBlock) -> None:
    """Quantize a block's keys and values into ``out``: after RoPE for a ring, before it for the sink.

    Error: at most half a step, 1/253 of the token's and head's largest magnitude (around the mean, for keys).

    Raises:
        ValueError: shapes do not fit.
    """
    if k_TNH.shape != out.k.shape or v_TNH.shape != out.v.shape:
        raise ValueError(f"k {tuple(k_TNH.shape)}, v {tuple(v_TNH.shape)}; the block holds {tuple(out.k.shape)}")
    _encode_keys(k_TNH, out)
    _encode(v_TNH, None, out.v, out.v_scale)


def decode_block(block: KVBlock, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [T, N, H] in ``dtype``; computed in float32, or float64 where that is asked for."""
    return decode_keys(block, dtype), _decoded(block.v, block.v_scale, dtype)


def decode_keys(block: KVBlock, dtype: torch.dtype) -> Tensor:
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    return _decoded(block.k, block.k_scale, compute).add_(block.k_mean).to(dtype)


def rotate_block(block: KVBlock, cos_TP: Tensor, sin_TP: Tensor, out: KVBlock | None = None) -> KVBlock:
    """The same block with RoPE applied to its keys, encoded anew; values are shared with ``block``.

    ``cos`` and ``sin`` float32 [T, head_dim / 2]. The condition keys are kept before RoPE, because their time position
    changes from block to block. Encoding them anew once a (block, step) costs one small pass and a second rounding of
    half a step; it leaves attention a single format to read. The keys go into those of ``out`` where it is given (see
    ``room_for_keys``).
    """
    if cos_TP.shape != (block.tokens, block.k.shape[2] // 2) or sin_TP.shape != cos_TP.shape:
        raise ValueError(
            f"cos {tuple(cos_TP.shape)} and sin {tuple(sin_TP.shape)}; expected "
            f"{(block.tokens, block.k.shape[2] // 2)}, a rotation for each token and pair of channels"
        )
    room = room_for_keys(block) if out is None else out
    _encode_keys(_rotated_keys(block, cos_TP, sin_TP), room)
    return dataclasses.replace(block, k=room.k, k_scale=room.k_scale, k_mean=room.k_mean)


def room_for_keys(block: KVBlock) -> KVBlock:
    """A block whose keys, their scales and mean are its own, with undefined values; it shares the values of ``block``.

    Kept and given to ``rotate_block``, it keeps the rotated keys at one address from call to call.
    """
    keys = {name: torch.empty_like(getattr(block, name)) for name in ("k", "k_scale", "k_mean")}
    return dataclasses.replace(block, **keys)


def _rotated_keys(block: KVBlock, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    if choose("rotate_keys", block.k.device) == TRITON:
        from lowvram_kernels.triton_rope import rotated_keys_triton

        record("rotate_keys", "int8: triton")
        return rotated_keys_triton(block, cos_TP, sin_TP)
    record("rotate_keys", "int8: torch")
    return rotate(decode_keys(block, torch.float32), cos_TP, sin_TP)


def _encode_keys(k_TNH: Tensor, out: KVBlock) -> None:
    out.k_mean.copy_(k_TNH.mean(dim=0, dtype=torch.float32))
    _encode(k_TNH, out.k_mean, out.k, out.k_scale)


def _encode(x_TNH: Tensor, mean_NH: Tensor | None, q_TNH: Tensor, scale_TN: Tensor) -> None:
    if choose("encode_kv", x_TNH.device) == TRITON:
        from lowvram_kernels.triton_rope import encode_triton

        record("encode_kv", "int8: triton")
        encode_triton(x_TNH, mean_NH, q_TNH, scale_TN)
        return
    record("encode_kv", "int8: torch")
    reference_encode(x_TNH, mean_NH, q_TNH, scale_TN)


def reference_encode(x_TNH: Tensor, mean_NH: Tensor | None, q_TNH: Tensor, scale_TN: Tensor) -> None:
    x = x_TNH.float() if mean_NH is None else x_TNH.float() - mean_NH
    scale_TN.copy_(x.abs().amax(dim=-1).clamp_min_(FLOOR).mul_(STEP))
    q_TNH.copy_((x * scale_TN.float().reciprocal_()[..., None]).round_())


def _decoded(q_TNH: Tensor, scale_TN: Tensor, dtype: torch.dtype) -> Tensor:
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    return q_TNH.to(compute).mul_(scale_TN[..., None]).to(dtype)
