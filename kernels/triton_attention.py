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
from lowvram_kernels.launch import launch
from lowvram_kernels.ring_codec import KVBlock
from lowvram_kernels.triton_prepare import (
    FIELDS,
    HALF,
    LEVELS,
    MAGIC,
    MAGIC_BITS,
    OF_K,
    OF_TOKENS,
    OF_V,
    Prepared,
    block_part,
    column_order,
    dim_p2,
    larger,
    prepare_queries,
    room_for,
    spread,
)
from lowvram_kernels.triton_values import RING_TILE

Tensor = torch.Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself asks, once


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries of a program, its warps and pipeline stages; keys of a step are those of a tile of the ring."""

    queries: int
    warps: int
    stages: int


# Three stages: with two, Triton copies a step's keys and values only once the step before is through. There is room in
# shared memory for one stage of heads wider than 128.
TILES = {80: Tile(128, 8, 3), 86: Tile(128, 8, 3), 89: Tile(128, 8, 3), 90: Tile(128, 8, 3), 120: Tile(128, 8, 3)}
WIDE_HEADS = Tile(64, 8, 2)


@triton.jit
def _row_maximum(score, INTERPRETED: tl.constexpr):
    """NaN where a row has one: that is how it reaches the sum of the weights, and with it the result."""
    if INTERPRETED:  # its maximum drops NaN, and any other one it takes element by element
        return tl.max(score, 1) + tl.sum(tl.where(score == score, 0.0, score), 1)
    else:
        return tl.reduce(score, 1, larger)


@triton.jit
def _weights_in_8_bits(exponent, INTERPRETED: tl.constexpr):
    """2^exponent, at most 1, in LEVELS, as bytes less HALF for a product; and their sum in each row, in LEVELS."""
    ROWS: tl.constexpr = exponent.shape[0]
    KEYS: tl.constexpr = exponent.shape[1]
    bits = (tl.exp2(exponent) * LEVELS + (MAGIC - HALF)).to(tl.int32, bitcast=True)
    if INTERPRETED:  # its sums do not wrap around
        total = tl.sum(bits - (MAGIC_BITS - HALF), 1)
    else:
        BASE: tl.constexpr = (KEYS * (MAGIC_BITS - HALF) + 2**31) % 2**32 - 2**31
        total = tl.sum(bits, 1) - BASE
    # Columns stand in the order of ``triton_prepare.column_order``: here they return to that of the tokens.
    byte = tl.permute(tl.reshape(bits.to(tl.int8), [ROWS, KEYS // 16, 2, 4, 2]), (0, 1, 3, 2, 4))
    return tl.reshape(byte, [ROWS, KEYS]), total.to(tl.float32)


@triton.jit
def _added(
    result, weight, values, sums, keep, up, FIRST: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """``result`` [L, SIZE] of the channels from FIRST on, with a tile's weighted values added."""
    ROWS: tl.constexpr = result.shape[0]
    dims = FIRST + tl.arange(0, SIZE)
    at = values + tl.arange(0, RING_TILE)[:, None] + dims[None, :] * RING_TILE
    real = dims < HEAD_DIM
    value = tl.load(at, mask=real[None, :], other=0) if FIRST + SIZE > HEAD_DIM else tl.load(at)
    start = tl.broadcast_to(tl.load(sums + dims).to(tl.int32, bitcast=True)[None, :], (ROWS, SIZE))
    part = tl.dot(weight, value, start, out_dtype=tl.int32).to(tl.float32, bitcast=True)
    # MAGIC is taken off with what fades: one instruction an element less, for a rounding of a part of one level.
    return part * up[:, None] + (result * keep[:, None] - (up * MAGIC)[:, None])


@triton.jit(do_not_specialize=["blocks", "longest"])
def _attend_kernel(
    q8,
    q_scale,
    q_mean,
    tiles,
    turns,
    origin,
    table,
    out,
    queries,
    blocks,
    longest,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_P2: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A program for BLOCK_L queries of a head. What it holds through the inner loop fills all registers, so that values
    go into the result in halves of their channels, and nothing is computed ahead of the loops that could wait."""
    HALF_DIM: tl.constexpr = DIM_P2 // 2
    head, item = tl.program_id(1), tl.program_id(2)
    first = tl.program_id(0) * BLOCK_L
    rows, dims, columns = tl.arange(0, BLOCK_L), tl.arange(0, DIM_P2), tl.arange(0, RING_TILE)
    order, half = column_order(columns), tl.arange(0, HALF_DIM)
    row_there = rows < queries - first
    there = row_there[:, None] & (dims < HEAD_DIM)[None, :]
    corner = (item * HEADS + head).to(tl.int64) * queries + first
    q = tl.load(q8 + corner * HEAD_DIM + rows[:, None] * HEAD_DIM + dims[None, :], mask=there, other=0)
    scale = tl.load(q_scale + corner + rows, mask=row_there, other=1.0)
    top = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    left = tl.zeros((BLOCK_L, HALF_DIM), tl.float32)
    right = tl.zeros((BLOCK_L, HALF_DIM), tl.float32)
    for block in tl.range(0, blocks, disable_licm=True):
        entry = item * blocks + block
        of_head = (entry * HEADS + head).to(tl.int64)
        tokens = tl.load(table + entry * FIELDS + OF_TOKENS).to(tl.int32)
        k = block_part(origin, table, entry, OF_K, 16) + head * HEAD_DIM
        v = block_part(origin, table, entry, OF_V, 16)
        v += head.to(tl.int64) * tl.cdiv(tokens, RING_TILE) * (HEAD_DIM * RING_TILE)
        first_tile = tiles + of_head * longest * (2 * RING_TILE + DIM_P2)
        shift = tl.load(q_mean + of_head * queries + first + rows, mask=row_there, other=0.0)
        for start in tl.range(0, tokens, RING_TILE, num_stages=STAGES, disable_licm=True):
            tile = first_tile + start // RING_TILE * (2 * RING_TILE + DIM_P2)
            # What stands in columns behind the last token is masked below, whatever it is.
            token = tl.minimum(order, tokens - 1 - start)
            at = k + start * (HEADS * HEAD_DIM) + token[None, :] * (HEADS * HEAD_DIM) + dims[:, None]
            keys = tl.load(at, mask=(dims < HEAD_DIM)[:, None], other=0) if DIM_P2 > HEAD_DIM else tl.load(at)
            product = tl.dot(q, keys, tl.full((BLOCK_L, RING_TILE), MAGIC_BITS, tl.int32), out_dtype=tl.int32)
            # Columns' steps, and what takes MAGIC off again; 0 and -inf where no token is.
            score = product.to(tl.float32, bitcast=True) * tl.load(tile + columns)[None, :]
            score += tl.load(tile + RING_TILE + columns)[None, :]
            here = _row_maximum(score, INTERPRETED) * scale + shift
            higher = larger(top, here)
            keep, up = tl.exp2(top - higher), tl.exp2(here - higher)
            weight, weights = _weights_in_8_bits(score * scale[:, None] + (shift - here)[:, None], INTERPRETED)
            total = total * keep + weights * up
            values = v + start * HEAD_DIM
            left = _added(left, weight, values, tile + 2 * RING_TILE, keep, up, 0, HALF_DIM, HEAD_DIM)
            right = _added(right, weight, values, tile + 2 * RING_TILE, keep, up, HALF_DIM, HALF_DIM, HEAD_DIM)
            top = higher
        turn = turns + of_head * DIM_P2
        left *= tl.load(turn + half)[None, :]
        right *= tl.load(turn + HALF_DIM + half)[None, :]
    # No sum is -1: but so addresses come of what the loops give, and are not held through them.
    rows += (total == -1.0).to(tl.int32)
    inverse = (1.0 / total)[:, None]
    at = (item.to(tl.int64) * queries + first) * (HEADS * HEAD_DIM) + head * HEAD_DIM
    at = out + at + rows[:, None] * (HEADS * HEAD_DIM) + half[None, :]
    there = (rows < queries - first)[:, None]
    tl.store(at, (left * inverse).to(out.dtype.element_ty), mask=there & (half < HEAD_DIM)[None, :])
    there &= (HALF_DIM + half < HEAD_DIM)[None, :]
    tl.store(at + HALF_DIM, (right * inverse).to(out.dtype.element_ty), mask=there)


def ring_attention_triton(q_ILNH: Tensor, lists: Sequence[Sequence[KVBlock]], tile: Tile | None = None) -> Tensor:
    """As ``ring_attention.ring_attention`` has checked it.

    Raises:
        ValueError: head_dim is above 256, or a block's parts are not contiguous and aligned to 16 bytes.
    """
    ready, out = room_for(len(q_ILNH), q_ILNH.shape[1], q_ILNH.dtype, lists)
    prepare_queries(q_ILNH, ready)
    spread(ready)
    attend_prepared(ready, out, tile)
    return out


def attend_prepared(ready: Prepared, out_ILNH: Tensor, tile: Tile | None) -> None:
    """Attention over all that ``ready`` names, into ``out``."""
    items, queries, heads, head_dim = out_ILNH.shape
    tile = tile or (TILES[known_generation(out_ILNH.device)] if head_dim <= 128 else WIDE_HEADS)
    launch(
        _attend_kernel,
        (-(-queries // tile.queries), heads, items),
        ready.q8,
        ready.q_scale,
        ready.q_mean,
        ready.tiles,
        ready.turns,
        ready.origin,
        ready.table,
        out_ILNH,
        queries,
        ready.q_mean.shape[1],
        ready.tiles.shape[3],
        HEADS=heads,
        HEAD_DIM=head_dim,
        DIM_P2=dim_p2(head_dim),
        BLOCK_L=tile.queries,
        STAGES=tile.stages,
        INTERPRETED=INTERPRETED,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def aot_case(
    name: str,
    tile: Tile,
    *,
    heads: int = 40,
    head_dim: int = 128,
    queries: str = "i32:16",
    out: str = "*bf16",
) -> Case:
    types = {
        "q8": "*i8",
        "q_scale": "*fp32",
        "q_mean": "*fp32",
        "tiles": "*fp32",
        "turns": "*fp32",
        "origin": "*i8",
    }
    types |= {"table": "*i64", "out": out, "longest": "i32", "queries": queries, "blocks": "i32"}
    constants = {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "DIM_P2": dim_p2(head_dim),
        "BLOCK_L": tile.queries,
        "STAGES": tile.stages,
    }
    constants |= {"INTERPRETED": False}
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
            f"ring_attention {heads} heads {queries} {out}", TILES[generation], heads=heads, queries=queries, out=out
        )
        for heads in (13, 20, 40)
        for queries, out in (("i32", "*bf16"), ("i32:16", "*fp32"))
    ]
