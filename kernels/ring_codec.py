"""The 8-bit form of a block's keys and values, as the KV rings hold it and attention reads it.

A slot is one stretch of bytes, in this order: v int8 [heads, tiles, head_dim, 128], k int8 [tokens, heads, head_dim],
v_sums int16 [heads, tiles, head_dim], k_scale bfloat16 [tokens, heads], k_mean and v_scale bfloat16 [heads, head_dim],
where k = k_int8 * k_scale + k_mean and v = v_int8 * v_scale.

Keys of a head lie around a common vector that would set the scale alone; softmax sees the same scores once q . k_mean
is added back for the keys of the block. Values lie in tiles of 128 tokens as the product with 8-bit weights reads them:
behind each other, channel by channel, with one scale a channel, which that product can leave to its end. Weights are
positive and bytes signed: ``v_sums``, of the values of each tile, put that right. Behind the last token values are 0.

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

FORMAT = 2
"""Version of this layout, which reports name beside rings of 8 bits. In 1 values lay as keys do, a scale a token."""
TILE_TOKENS = 128
# A step over the largest magnitude, a little more than 1 / 127: rounded to bfloat16 (8 bits) it is still not less.
STEP = (1 + 2.0**-8) / 127


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVBlock:
    """Encoded keys and values of T tokens: views into a slot, or tensors of their own.

    ``k`` int8 [T, N, H], ``v`` int8 [N, tiles, H, 128]; ``k_scale`` bfloat16 [T, N]; ``v_scale``, ``k_mean`` bfloat16
    [N, H]; ``v_sums`` int16 [N, tiles, H]; all contiguous.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor
    v_scale: Tensor
    k_mean: Tensor
    v_sums: Tensor

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
    def tiles(self) -> int:
        return -(-self.tokens // TILE_TOKENS)

    @property
    def key_bytes(self) -> int:
        """Of keys, with their scales and mean."""
        return self.tokens * self.heads * (self.head_dim + 2) + 2 * self.heads * self.head_dim

    @property
    def nbytes(self) -> int:
        return self.key_bytes + self.heads * self.head_dim * (self.tiles * (TILE_TOKENS + 2) + 2)

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
        heads, channels, tiles = self.heads, self.heads * self.head_dim, self.tiles
        v, k, v_sums, k_scale, k_mean, v_scale = slot[: self.nbytes].split(
            [
                channels * tiles * TILE_TOKENS,
                self.tokens * channels,
                2 * channels * tiles,
                2 * self.tokens * heads,
                2 * channels,
                2 * channels,
            ]
        )
        return KVBlock(
            k=k.view(torch.int8).view(self.tokens, heads, self.head_dim),
            v=v.view(torch.int8).view(heads, tiles, self.head_dim, TILE_TOKENS),
            k_scale=k_scale.view(torch.bfloat16).view(self.tokens, heads),
            v_scale=v_scale.view(torch.bfloat16).view(heads, self.head_dim),
            k_mean=k_mean.view(torch.bfloat16).view(heads, self.head_dim),
            v_sums=v_sums.view(torch.int16).view(heads, tiles, self.head_dim),
        )


def values_shape(k_TNH: Tensor) -> tuple[int, int, int, int]:
    """That of a block's ``v`` beside such keys."""
    tokens, heads, head_dim = k_TNH.shape
    return heads, -(-tokens // TILE_TOKENS), head_dim, TILE_TOKENS


def encode_block(k_TNH: Tensor, v_TNH: Tensor, out: KVBlock) -> None:
    """Quantize a block's keys and values into ``out``: after RoPE for a ring, before it for the sink.

    Error: at most half a step, 1/253 of the largest magnitude: for keys, around their mean, the token's and head's; for
    values the channel's in this block. Where that is NaN or infinite, so is what is read again.

    Raises:
        ValueError: shapes do not fit.
    """
    if k_TNH.shape != out.k.shape or v_TNH.shape != out.k.shape:
        raise ValueError(f"k {tuple(k_TNH.shape)}, v {tuple(v_TNH.shape)}; the block holds {tuple(out.k.shape)}")
    _encode_keys(k_TNH, out)
    _encode_values(v_TNH, out)


def decode_block(block: KVBlock, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [T, N, H] in ``dtype``; computed in float32, or float64 where that is asked for."""
    heads, _, head_dim, _ = block.v.shape
    v_TNH = block.v.permute(1, 3, 0, 2).reshape(-1, heads, head_dim)[: block.tokens]
    return decode_keys(block, dtype), v_TNH.to(_computed_in(dtype)).mul_(block.v_scale).to(dtype)


def decode_keys(block: KVBlock, dtype: torch.dtype) -> Tensor:
    return block.k.to(_computed_in(dtype)).mul_(block.k_scale[..., None]).add_(block.k_mean).to(dtype)


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
    if choose("encode_kv", k_TNH.device) == TRITON:
        from lowvram_kernels.triton_rope import encode_keys_triton

        record("encode_kv", "int8: triton")
        encode_keys_triton(k_TNH, out)
        return
    record("encode_kv", "int8: torch")
    reference_encode_keys(k_TNH, out)


def _encode_values(v_TNH: Tensor, out: KVBlock) -> None:
    if choose("encode_kv", v_TNH.device) == TRITON:
        from lowvram_kernels.triton_values import encode_values_triton

        record("encode_kv", "int8: triton")
        set_value_scales(v_TNH, out)
        encode_values_triton(v_TNH, out)
        return
    record("encode_kv", "int8: torch")
    reference_encode_values(v_TNH, out)


def reference_encode_keys(k_TNH: Tensor, out: KVBlock) -> None:
    """Around ``out.k_mean``, which is there."""
    x = k_TNH.float() - out.k_mean
    out.k_scale.copy_(x.abs().amax(dim=-1).clamp_min_(FLOOR).mul_(STEP))
    out.k.copy_((x * out.k_scale.float().reciprocal_()[..., None]).round_())


def set_value_scales(v_TNH: Tensor, out: KVBlock) -> None:
    # Of both ends: the magnitudes of all would take memory.
    largest = torch.maximum(v_TNH.amax(dim=0), v_TNH.amin(dim=0).neg_()).float()
    out.v_scale.copy_(largest.clamp_min_(FLOOR).mul_(STEP))


def reference_encode_values(v_TNH: Tensor, out: KVBlock) -> None:
    set_value_scales(v_TNH, out)
    q = (v_TNH.float() * out.v_scale.float().reciprocal_()).round_()
    full, rest = divmod(len(q), TILE_TOKENS)
    whole = q[: full * TILE_TOKENS].unflatten(0, (full, TILE_TOKENS)) if full else q[:0, None]
    out.v[:, :full].copy_(whole.permute(2, 0, 3, 1))
    if rest:
        out.v[:, full].zero_()
        out.v[:, full, :, :rest].copy_(q[full * TILE_TOKENS :].permute(1, 2, 0))
    out.v_sums.copy_(out.v.sum(dim=-1, dtype=torch.int16))


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
