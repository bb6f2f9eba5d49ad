"""Attention over encoded blocks, in one launch over all of them where they lie; see ``triton_prepare``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lowvram_kernels.aot import Case
from lowvram_kernels.chips import known_generation
from lowvram_kernels.ring_codec import KVBlock
from lowvram_kernels.triton_prepare import Prepared, block_part, dim_p2, prepare_queries, room_for, spread_scales

Tensor = torch.Tensor

# As an int32 the bits of 1.5 * 2^23: sums of 8-bit products that start there are, read as float32, that number plus
# the sum (below 2^22 for up to 260 channels), which spares a conversion instruction an element.
MAGIC_BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(12582912.0)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself asks, once


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries and keys of one step of a program, its warps and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


# Three stages: with two, Triton copies a step's keys and values only once the step before is through. That costs sm_90
# and sm_120 half of the keys of a step (fewer instructions a key with more), or registers would spill.
TILES = {
    80: Tile(128, 64, 8, 3),
    86: Tile(128, 64, 8, 3),
    89: Tile(128, 64, 8, 3),
    90: Tile(128, 64, 8, 3),
    120: Tile(128, 32, 8, 3),
}


# Four int8 to four bfloat16, exactly: each byte, shifted to 0..255, becomes the low bits of 2^23 as a float32; less
# 2^23 + 128 its upper half is the result. As assembly that counts as impure, because the compiler moves a plain
# conversion behind the distribution of the operand over the warps, where each of them converts everything.
TO_BF16 = tl.constexpr("""{
.reg .b32 u, a, b, c, d;
xor.b32 u, $2, 0x80808080;
prmt.b32 a, u, 0x4B000000, 0x7440;
prmt.b32 b, u, 0x4B000000, 0x7441;
prmt.b32 c, u, 0x4B000000, 0x7442;
prmt.b32 d, u, 0x4B000000, 0x7443;
sub.f32 a, a, 0f4B000080;
sub.f32 b, b, 0f4B000080;
sub.f32 c, c, 0f4B000080;
sub.f32 d, d, 0f4B000080;
prmt.b32 $0, a, b, 0x7632;
prmt.b32 $1, c, d, 0x7632;
}""")


@triton.jit
def _weighted_sum(weight, values, result, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # the interpreter has neither bfloat16 products nor assembly
        return tl.dot(weight, values.to(tl.float32), result, input_precision="ieee")
    else:
        wide = tl.inline_asm_elementwise(TO_BF16, "=r,=r,r", [values], dtype=tl.bfloat16, is_pure=False, pack=4)
        return tl.dot(weight.to(tl.bfloat16), wide, result)


@triton.jit
def _attend_kernel(
    q8,
    q_scale,
    q_mean,
    scales,
    origin,
    table,
    out,
    queries,
    blocks,
    padded,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_P2: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_T: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    head, item = tl.program_id(1), tl.program_id(2)
    first = tl.program_id(0) * BLOCK_L
    rows, dims = tl.arange(0, BLOCK_L), tl.arange(0, DIM_P2)
    row_there = rows < queries - first
    there = row_there[:, None] & (dims < HEAD_DIM)[None, :]
    corner = (item * HEADS + head).to(tl.int64) * queries + first
    q = tl.load(q8 + corner * HEAD_DIM + rows[:, None] * HEAD_DIM + dims[None, :], mask=there, other=0)
    scale = tl.load(q_scale + corner + rows, mask=row_there, other=1.0)
    top = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    result = tl.zeros((BLOCK_L, DIM_P2), tl.float32)
    for block in range(blocks):
        entry = item * blocks + block
        k = block_part(origin, table, entry, 0, 16) + head * HEAD_DIM
        v = block_part(origin, table, entry, 1, 16) + head * HEAD_DIM
        k_scale = scales + (entry * 2 * HEADS + head).to(tl.int64) * padded
        v_scale = k_scale + HEADS * padded
        tokens = tl.load(table + entry * 6 + 5).to(tl.int32)
        line = ((item * blocks + block) * HEADS + head).to(tl.int64) * queries + first
        shift = tl.load(q_mean + line + rows, mask=row_there, other=0.0)
        for start in range(0, tokens, BLOCK_T):
            token = start + tl.arange(0, BLOCK_T)
            seen = token < tokens
            inside = seen[None, :] if DIM_P2 == HEAD_DIM else seen[None, :] & (dims < HEAD_DIM)[:, None]
            keys = tl.load(k + token[None, :] * (HEADS * HEAD_DIM) + dims[:, None], mask=inside, other=0)
            step = tl.load(k_scale + token)
            product = tl.dot(q, keys, tl.full((BLOCK_L, BLOCK_T), MAGIC_BITS, tl.int32), out_dtype=tl.int32)
            score = (product.to(tl.float32, bitcast=True) - MAGIC) * step[None, :]
            score = tl.where(seen[None, :], score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1) * scale + shift)
            weight = tl.exp2(score * scale[:, None] + (shift - higher)[:, None])
            fade = tl.exp2(top - higher)
            total = total * fade + tl.sum(weight, 1)
            inside = seen[:, None] if DIM_P2 == HEAD_DIM else seen[:, None] & (dims < HEAD_DIM)[None, :]
            values = tl.load(v + token[:, None] * (HEADS * HEAD_DIM) + dims[None, :], mask=inside, other=0)
            step = tl.load(v_scale + token)
            result = _weighted_sum(weight * step[None, :], values, result * fade[:, None], INTERPRETED)
            top = higher
    result = result / total[:, None]
    at = (item.to(tl.int64) * queries + first) * (HEADS * HEAD_DIM) + head * HEAD_DIM
    at = out + at + rows[:, None] * (HEADS * HEAD_DIM) + dims[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=there)


def ring_attention_triton(q_ILNH: Tensor, lists: Sequence[Sequence[KVBlock]], tile: Tile | None = None) -> Tensor:
    """As ``ring_attention.ring_attention`` has checked it.

    Raises:
        ValueError: head_dim is above 256, or a block's parts are not contiguous and aligned to 16 bytes.
    """
    ready, out = room_for(len(q_ILNH), q_ILNH.shape[1], q_ILNH.dtype, lists)
    prepare_queries(q_ILNH, ready)
    spread_scales(ready)
    attend_prepared(ready, out, tile)
    return out


def attend_prepared(ready: Prepared, out_ILNH: Tensor, tile: Tile | None) -> None:
    """Attention over all that ``ready`` names, into ``out``."""
    items, queries, heads, head_dim = out_ILNH.shape
    tile = tile or TILES[known_generation(out_ILNH.device)]
    _attend_kernel[(-(-queries // tile.queries), heads, items)](
        ready.q8,
        ready.q_scale,
        ready.q_mean,
        ready.scales,
        ready.origin,
        ready.table,
        out_ILNH,
        queries,
        ready.q_mean.shape[1],
        ready.scales.shape[-1],
        HEADS=heads,
        HEAD_DIM=head_dim,
        DIM_P2=dim_p2(head_dim),
        BLOCK_L=tile.queries,
        BLOCK_T=tile.keys,
        INTERPRETED=INTERPRETED,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def aot_case(
    name: str, tile: Tile, *, heads: int = 40, queries: str = "i32:16", out: str = "*bf16", one_block: bool = False
) -> Case:
    types = {"q8": "*i8", "q_scale": "*fp32", "q_mean": "*fp32", "scales": "*fp32", "origin": "*i8"}
    types |= {"table": "*i64", "out": out, "padded": "i32:16", "queries": queries, "blocks": "i32"}
    constants = {"HEADS": heads, "HEAD_DIM": 128, "DIM_P2": 128, "BLOCK_L": tile.queries, "BLOCK_T": tile.keys}
    constants |= {"INTERPRETED": False} | ({"blocks": 1} if one_block else {})  # a 1 is compiled in by the launcher
    return Case(
        name=name,
        kernel=_attend_kernel,
        types=types,
        constants=constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def aot_cases(generation: int) -> list[Case]:
    tile = TILES[generation]
    return [
        aot_case("ring_attention", tile),
        aot_case("ring_attention odd", tile, heads=13, queries="i32", out="*fp32"),
    ]


def more_aot_cases(generation: int) -> list[Case]:
    return [
        aot_case(
            f"ring_attention {heads} heads {queries} {out} {'one block' if one else ''}",
            TILES[generation],
            heads=heads,
            queries=queries,
            out=out,
            one_block=one,
        )
        for heads in (13, 20, 40)
        for queries, out in (("i32", "*bf16"), ("i32:16", "*fp32"))
        for one in (False, True)
    ]
