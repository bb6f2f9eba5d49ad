"""Attention over 8-bit rings and sink, block by block, without joining or dequantizing them in memory.

Order of preference: Triton on CUDA from sm_80 on (queries quantized a token and head, int8 q k^T, q . k_mean added back
a block; weights of each tile of keys in 8 bits below their largest, int8 p v; softmax online over all blocks);
otherwise PyTorch over the decoded blocks, also where the kernel failed selftest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch

from lowvram_kernels.attention import sdpa
from lowvram_kernels.choices import TRITON, choose
from lowvram_kernels.ring_codec import TILE_TOKENS, KVBlock, decode_block, decode_keys, rotate_block, values_shape
from lowvram_kernels.rope import rotate
from lowvram_kernels.rows import FLOOR
from lowvram_kernels.trace import record

Tensor = torch.Tensor

LEVELS = 255
"""Weights of a tile's keys are rounded to so many parts of the largest one."""


def ring_attention(q: Tensor, blocks: Sequence[KVBlock] | Sequence[Sequence[KVBlock]]) -> Tensor:
    """softmax(q k^T / sqrt(H)) v over all tokens of ``blocks``: q [L, N, H] -> [L, N, H], the dtype of q.

    ``blocks`` are the visible slots of a ring and the sink with its keys rotated, in any order. Several wave items go
    through one launch: q [I, L, N, H] with I lists of blocks, as many in each list.
    Against float64 on the decoded blocks: relative error about 1 % (the 8 bits of queries and weights); PyTorch's path
    1e-6.

    Raises:
        TypeError: q is not floating point, or a block not encoded.
        ValueError: no block, shapes or devices that do not fit.
    """
    items: Tensor = q if q.ndim == 4 else q[None]
    lists = cast(Sequence[Sequence[KVBlock]], blocks if q.ndim == 4 else [blocks])
    check_blocks(items, lists)
    if not items.numel():
        return torch.empty_like(q)
    if choose("ring_attention", q.device) == TRITON:
        from lowvram_kernels.triton_attention import ring_attention_triton

        record("ring_attention", "int8: triton")
        return ring_attention_triton(items, lists).view(q.shape)
    record("ring_attention", _decoded_name(q))
    return torch.stack([decoded_attention(one, some) for one, some in zip(items, lists, strict=True)]).view(q.shape)


def ring_and_sink_attention(
    q_LNH: Tensor,
    blocks: Sequence[KVBlock],
    sink: KVBlock,
    cos_TP: Tensor,
    sin_TP: Tensor,
    *,
    rotated: KVBlock | None = None,
) -> Tensor:
    """``ring_attention`` over a ring's blocks and a sink that is kept before RoPE: its keys are rotated by ``cos`` and
    ``sin`` float32 [sink tokens, H / 2] now, because their time position changes from block to block.

    The Triton kernel wants them in 8 bit again (``rotate_block``), in ``rotated`` where it is given; PyTorch's path
    rotates what it decodes.
    """
    check_blocks(q_LNH[None], [[*blocks, sink]])
    if choose("ring_attention", q_LNH.device) == TRITON:
        return ring_attention(q_LNH, [*blocks, rotate_block(sink, cos_TP, sin_TP, rotated)])
    record("ring_attention", _decoded_name(q_LNH))
    keys = rotate(decode_keys(sink, torch.float32), cos_TP, sin_TP).to(q_LNH.dtype)
    return decoded_attention(q_LNH, [*blocks, sink], last_keys=keys)


def reference_ring_attention(q_LNH: Tensor, blocks: Sequence[KVBlock]) -> Tensor:
    """In float64, over the decoded blocks joined."""
    pairs = [decode_block(block, torch.float64) for block in blocks]
    k, v = (torch.cat(part) for part in zip(*pairs, strict=True))
    scores = torch.einsum("lnh,snh->nls", q_LNH.double(), k) * q_LNH.shape[-1] ** -0.5
    return torch.einsum("nls,snh->lnh", scores.softmax(dim=-1), v)


def stepwise_attention(q_LNH: Tensor, blocks: Sequence[KVBlock]) -> Tensor:
    """What the Triton kernel computes, step by step in float32: for tests, and for figures of its error."""
    q = q_LNH.float().transpose(0, 1)
    q_scale = q.abs().amax(-1, keepdim=True).clamp_min(FLOOR) / 127
    q8, to_log2 = (q / q_scale).round(), math.log2(math.e) / math.sqrt(q.shape[-1])
    top = torch.full_like(q_scale, -math.inf)
    total, result = torch.zeros_like(q_scale), torch.zeros_like(q)
    for block in blocks:
        shift = (q @ block.k_mean.float()[..., None]) * to_log2
        tiles = zip(*(part.split(TILE_TOKENS) for part in (block.k, block.k_scale)), block.v.unbind(1), strict=True)
        for k, k_scale, v_NHT in tiles:
            step = k_scale.float().t()[:, None] * q_scale * to_log2
            score = (q8 @ k.float().permute(1, 2, 0)) * step + shift
            here = score.amax(-1, keepdim=True)
            higher = torch.maximum(top, here)
            keep, up = torch.exp2(top - higher), torch.exp2(here - higher)
            level = torch.exp2(score - here).mul_(LEVELS).round_()
            part = level @ v_NHT[..., : len(k)].float().transpose(1, 2) * block.v_scale.float()[:, None]
            total, result = total * keep + level.sum(-1, keepdim=True) * up, result * keep + part * up
            top = higher
    return (result / total).transpose(0, 1).to(q_LNH.dtype)


def _decoded_name(q: Tensor) -> str:
    return f"int8 decoded to {str(q.dtype).removeprefix('torch.')}: torch scaled_dot_product_attention"


def decoded_attention(q_LNH: Tensor, blocks: Sequence[KVBlock], last_keys: Tensor | None = None) -> Tensor:
    """``last_keys`` stand for those of the last block."""
    tokens = sum(block.tokens for block in blocks)
    k, v = (q_LNH.new_empty((tokens, *q_LNH.shape[1:])) for _ in range(2))
    start = 0
    for block in blocks:
        stop = start + block.tokens
        k[start:stop], v[start:stop] = decode_block(block, q_LNH.dtype)
        start = stop
    if last_keys is not None:
        k[-len(last_keys) :] = last_keys
    return sdpa(q_LNH, k, v)


def check_blocks(q_ILNH: Tensor, lists: Sequence[Sequence[KVBlock]]) -> None:
    """Raises: TypeError and ValueError, as ``ring_attention``."""
    if q_ILNH.ndim != 4 or not q_ILNH.is_floating_point():
        raise TypeError(f"q is {q_ILNH.dtype} {tuple(q_ILNH.shape)}; expected floating point [L, N, H] or [I, L, N, H]")
    if len(lists) != len(q_ILNH) or not lists[0] or any(len(some) != len(lists[0]) for some in lists):
        raise ValueError(
            f"{len(q_ILNH)} items of queries and lists of {[len(some) for some in lists]} blocks; expected a list for "
            "each item, all equally long, with at least one block"
        )
    shape = q_ILNH.shape[2:]
    for block in (block for some in lists for block in some):
        if block.k.dtype is not torch.int8 or block.v.dtype is not torch.int8:
            raise TypeError(f"a block holds {block.k.dtype} and {block.v.dtype}; expected int8, from encode_block")
        if block.k.shape[1:] != shape or not block.tokens or block.v.shape != values_shape(block.k):
            raise ValueError(
                f"a block of {tuple(block.k.shape)} for queries {tuple(q_ILNH.shape)}: heads or width differ"
            )
        if block.k.device != q_ILNH.device:
            raise ValueError(f"queries on {q_ILNH.device}, a block on {block.k.device}; copy the block there first")
