"""Preparation of attention over encoded blocks: where the blocks lie, 8-bit queries, scales in reading order.

A table tells where the parts of each block are, so that slots of rings, staging buffers and the sink are read where
they lie. A row of it: the distances in bytes of k, v, k_scale, v_scale, k_mean and v_sums from the first block's keys,
and the number of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lowvram_kernels import ring_attention
from lowvram_kernels.aot import Case
from lowvram_kernels.holding import hold
from lowvram_kernels.launch import launch
from lowvram_kernels.ring_codec import TILE_TOKENS, KVBlock
from lowvram_kernels.triton_rows import magnitude_bits, power_of_2, quantize_scales, to_8bit
from lowvram_kernels.triton_values import RING_TILE
from lowvram_kernels.uploads import upload

Tensor = torch.Tensor

QUERIES = 32  # of one program
MAX_HEAD_DIM = 256
# Columns of the table.
OF_K, OF_V, OF_K_SCALE, OF_V_SCALE, OF_K_MEAN, OF_V_SUMS, OF_TOKENS = (tl.constexpr(index) for index in range(7))
FIELDS = tl.constexpr(7)
# As an int32 the bits of 1.5 * 2^23: sums of 8-bit products that start there are, read as float32, that number plus
# the sum (below 2^22 for 260 channels or for the keys of a tile), which spares a conversion instruction an element.
MAGIC_BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(12582912.0)
# Weights of a tile's keys are 0 to 255 of these parts of the largest one, less HALF to fit a signed byte.
LEVELS, HALF = tl.constexpr(float(ring_attention.LEVELS)), tl.constexpr(128)
# Results are held in steps of a block's values. Where those of a channel are all but 0 in one block and not in another,
# its step counts as this part of the largest: nothing overflows, and nothing that 8 bits could show is lost.
LEAST = tl.constexpr(2.0**-60)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """``q8`` int8 [I, N, L, H], ``q_scale`` float32 [I, N, L] and ``q_mean`` (q . k_mean) float32 [I, B, N, L], both
    scaled for exp2; ``tiles`` float32 [I, B, N, tiles, 128 + 128 + H padded], scales of a tile's keys in the order of
    ``column_order``, -MAGIC times as much, and the bits of int32 that sums of products with its values start with;
    ``turns`` float32 [I, B, N, H padded], what the result is multiplied by behind each block; ``table`` int64 [I * B,
    7] and ``aligned``, of which all its distances are multiples. What is computed holds nothing yet where ``room_for``
    made it.
    """

    origin: Tensor
    table: Tensor
    aligned: int
    q8: Tensor
    q_scale: Tensor
    q_mean: Tensor
    tiles: Tensor
    turns: Tensor


@triton.jit
def column_order(columns):
    """Which token of a tile stands in each column of its scores. A thread holds columns 2 i, 2 i + 1, 2 i + 8 and
    2 i + 9 of 16 where the product of scores leaves them, and wants 4 i to 4 i + 3 for that of weights and values."""
    return (columns & -16) | ((columns & 6) << 1) | ((columns & 8) >> 2) | (columns & 1)


@triton.jit
def block_part(origin, table, entry, field: tl.constexpr, ALIGNED: tl.constexpr):
    """Address of a block's part by its distance in bytes from ``origin``: a multiple of ALIGNED, for k and v of 16."""
    distance = tl.load(table + entry * FIELDS + field)
    distance = tl.multiple_of(distance, 16 if field <= OF_V else ALIGNED)
    return origin + distance


@triton.jit
def _prepare_kernel(
    q,
    origin,
    table,
    q8,
    q_scale,
    q_mean,
    queries,
    blocks,
    softmax_scale,
    stride_qi,
    stride_ql,
    stride_qn,
    ALIGNED: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_P2: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Queries [I, L, N, H] -> int8 and scale by head, and q . k_mean for every block; both scaled for exp2."""
    head, item = tl.program_id(1), tl.program_id(2)
    rows, dims = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L), tl.arange(0, DIM_P2)
    there = (rows < queries)[:, None] & (dims < HEAD_DIM)[None, :]
    at = q + item.to(tl.int64) * stride_qi + rows.to(tl.int64)[:, None] * stride_ql + head * stride_qn + dims[None, :]
    value = tl.load(at, mask=there, other=0.0).to(tl.float32)
    scale, inverse = quantize_scales(tl.max(magnitude_bits(value), 1), 127.0)
    line = (item * HEADS + head).to(tl.int64) * queries + rows
    tl.store(q8 + line[:, None] * HEAD_DIM + dims[None, :], to_8bit(value * inverse[:, None], True), mask=there)
    tl.store(q_scale + line, scale * softmax_scale, mask=rows < queries)
    for block in range(blocks):
        k_mean = block_part(origin, table, item * blocks + block, OF_K_MEAN, ALIGNED).to(tl.pointer_type(tl.bfloat16))
        mean = tl.load(k_mean + head * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        dot = tl.sum(value * mean[None, :], 1) * softmax_scale
        line = ((item * blocks + block) * HEADS + head).to(tl.int64) * queries + rows
        tl.store(q_mean + line, dot, mask=rows < queries)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _value_steps(origin, table, entry, ALIGNED: tl.constexpr, at, there):
    steps = block_part(origin, table, entry, OF_V_SCALE, ALIGNED).to(tl.pointer_type(tl.bfloat16))
    return tl.load(steps + at, mask=there, other=1.0).to(tl.float32)


@triton.jit
def _store_turns(
    origin, table, turns, block, blocks, ALIGNED: tl.constexpr, HEADS: tl.constexpr, HEADS_P2: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_P2: tl.constexpr,
):  # fmt: skip
    """From steps of this block's values into those of the next; behind the last block, out of its steps."""
    heads, dims = tl.arange(0, HEADS_P2)[:, None], tl.arange(0, DIM_P2)[None, :]
    there, at = (heads < HEADS) & (dims < HEAD_DIM), heads * HEAD_DIM + dims
    first = block // blocks * blocks
    least = tl.zeros((HEADS_P2, DIM_P2), tl.float32)
    for other in range(blocks):
        least = larger(least, _value_steps(origin, table, first + other, ALIGNED, at, there))
    least *= LEAST
    turn = larger(_value_steps(origin, table, block, ALIGNED, at, there), least)
    if block - first < blocks - 1:
        turn = tl.div_rn(turn, larger(_value_steps(origin, table, block + 1, ALIGNED, at, there), least))
    place = turns + (block * HEADS).to(tl.int64) * DIM_P2 + heads * DIM_P2 + dims
    tl.store(place, turn, mask=heads < HEADS)


@triton.jit(do_not_specialize=["blocks", "longest"])
def _spread_kernel(
    origin,
    table,
    tiles,
    turns,
    blocks,
    longest,
    ALIGNED: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_P2: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_P2: tl.constexpr,
):
    """A program for a tile of a block and all heads: scales of keys [T, N] and sums of values [N, tiles, H] as
    ``Prepared`` has them, ``longest`` tiles a block; the first of a block has its turns too. Columns behind the last
    token get the scale 0 and -inf beside it, which masks them."""
    tile, block = tl.program_id(0), tl.program_id(1)
    tokens = tl.load(table + block * FIELDS + OF_TOKENS).to(tl.int32)
    columns, heads, dims = tl.arange(0, RING_TILE), tl.arange(0, HEADS_P2), tl.arange(0, DIM_P2)
    real = (heads < HEADS)[:, None]
    line = (((block * HEADS + heads) * longest + tile).to(tl.int64) * (2 * RING_TILE + DIM_P2))[:, None]
    token = tile * RING_TILE + column_order(columns)
    part = block_part(origin, table, block, OF_K_SCALE, ALIGNED).to(tl.pointer_type(tl.bfloat16))
    there = (token < tokens)[:, None] & (heads < HEADS)[None, :]
    value = tl.trans(tl.load(part + token[:, None] * HEADS + heads[None, :], mask=there, other=0.0).to(tl.float32))
    tl.store(tiles + line + columns[None, :], value, mask=real)
    bias = tl.where((token < tokens)[None, :], value * -MAGIC, float("-inf"))
    tl.store(tiles + line + RING_TILE + columns[None, :], bias, mask=real)
    part = block_part(origin, table, block, OF_V_SUMS, ALIGNED).to(tl.pointer_type(tl.int16))
    own = tl.cdiv(tokens, RING_TILE)
    # Not "& (tile < own)": one number's comparison makes integers of a mask in the interpreter, which 3.9's refuses.
    there = (heads < tl.where(tile < own, HEADS, 0))[:, None] & (dims < HEAD_DIM)[None, :]
    total = tl.load(part + (heads[:, None] * own + tile) * HEAD_DIM + dims[None, :], mask=there, other=0)
    start = (total.to(tl.int32) * HALF + MAGIC_BITS).to(tl.float32, bitcast=True)
    tl.store(tiles + line + 2 * RING_TILE + dims[None, :], start, mask=real)
    if tile == 0:
        _store_turns(origin, table, turns, block, blocks, ALIGNED, HEADS, HEADS_P2, HEAD_DIM, DIM_P2)


def dim_p2(head_dim: int) -> int:
    return max(32, power_of_2(head_dim))  # a product of bytes takes 32 at the least


def room_for(
    items: int, queries: int, dtype: torch.dtype, lists: Sequence[Sequence[KVBlock]]
) -> tuple[Prepared, Tensor]:
    """Room for what attention of so many queries an item reads, and for its result [I, L, N, H] in ``dtype``.

    Raises:
        ValueError: head_dim is above 256, or a block's parts are not contiguous and aligned.
    """
    origin = lists[0][0].k
    _, heads, head_dim = origin.shape
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}; the 8-bit attention kernel takes {MAX_HEAD_DIM} at most")
    device, blocks = origin.device, len(lists[0])
    tiles = max(block.v.shape[1] for some in lists for block in some)
    table, aligned = _table(device, tuple(_row(block, origin.data_ptr()) for some in lists for block in some))
    ready = Prepared(
        origin=origin,
        table=hold(table),
        aligned=aligned,
        q8=torch.empty((items, heads, queries, head_dim), dtype=torch.int8, device=device),
        q_scale=torch.empty((items, heads, queries), dtype=torch.float32, device=device),
        q_mean=torch.empty((items, blocks, heads, queries), dtype=torch.float32, device=device),
        tiles=torch.empty(
            (items, blocks, heads, tiles, 2 * TILE_TOKENS + dim_p2(head_dim)), dtype=torch.float32, device=device
        ),
        turns=torch.empty((items, blocks, heads, dim_p2(head_dim)), dtype=torch.float32, device=device),
    )
    return ready, torch.empty((items, queries, heads, head_dim), dtype=dtype, device=device)


def softmax_scale(head_dim: int) -> float:
    return math.log2(math.e) / math.sqrt(head_dim)


def prepare_queries(q_ILNH: Tensor, ready: Prepared) -> None:
    items, queries, heads, head_dim = q_ILNH.shape
    q_ILNH = q_ILNH if q_ILNH.stride(3) == 1 else q_ILNH.contiguous()
    launch(
        _prepare_kernel,
        (-(-queries // QUERIES), heads, items),
        q_ILNH,
        ready.origin,
        ready.table,
        ready.q8,
        ready.q_scale,
        ready.q_mean,
        queries,
        ready.q_mean.shape[1],
        softmax_scale(head_dim),
        *q_ILNH.stride()[:3],
        ALIGNED=ready.aligned,
        HEADS=heads,
        HEAD_DIM=head_dim,
        DIM_P2=dim_p2(head_dim),
        BLOCK_L=QUERIES,
        num_warps=4,
        enable_fp_fusion=False,
    )


def spread(ready: Prepared) -> None:
    """Scales of keys and sums of values, of all blocks; those that a launch writes have to be written before."""
    items, blocks, heads, longest, _ = ready.tiles.shape
    head_dim = ready.origin.shape[2]
    launch(
        _spread_kernel,
        (longest, items * blocks),
        ready.origin,
        ready.table,
        ready.tiles,
        ready.turns,
        blocks,
        longest,
        ALIGNED=ready.aligned,
        HEADS=heads,
        HEADS_P2=power_of_2(heads),
        HEAD_DIM=head_dim,
        DIM_P2=dim_p2(head_dim),
        num_warps=4,
        enable_fp_fusion=False,
    )


def _row(block: KVBlock, origin: int) -> tuple[int, ...]:
    parts = (block.k, block.v, block.k_scale, block.v_scale, block.k_mean, block.v_sums)
    if not all(part.is_contiguous() for part in parts) or block.k.data_ptr() % 16 or block.v.data_ptr() % 16:
        raise ValueError(
            "a block's parts have to be contiguous, k and v at multiples of 16 bytes: use a SlotLayout over a slot "
            "that starts at one"
        )
    return (*(part.data_ptr() - origin for part in parts), block.tokens)


@functools.lru_cache(maxsize=4096)
def _table(device: torch.device, rows: tuple[tuple[int, ...], ...]) -> tuple[Tensor, int]:
    # Kept, because a ring's slots come round, and with them their addresses.
    aligned = 16 if all(distance % 16 == 0 for row in rows for distance in row[:-1]) else 2
    return upload(torch.tensor(rows, dtype=torch.int64, device="cpu"), device), aligned


def aot_cases(generation: int) -> list[Case]:
    return _aot_cases(40, "*bf16", "i32:16")


def more_aot_cases(generation: int) -> list[Case]:
    cases = [case for heads in (13, 20) for case in _aot_cases(heads, "*fp32", "i32")]
    return [dataclasses.replace(case, name=f"{case.name} {case.constants['HEADS']} heads") for case in cases]


def _aot_cases(heads: int, q: str, number: str) -> list[Case]:
    types = {"q": q, "origin": "*i8", "table": "*i64", "q8": "*i8", "q_scale": "*fp32", "q_mean": "*fp32"}
    types |= {"queries": number, "blocks": "i32", "softmax_scale": "fp32"}
    types |= dict.fromkeys(("stride_qi", "stride_ql", "stride_qn"), "i32:16")
    queries = Case(
        name="ring_attention queries",
        kernel=_prepare_kernel,
        types=types,
        constants={"ALIGNED": 16, "HEADS": heads, "HEAD_DIM": 128, "DIM_P2": 128, "BLOCK_L": QUERIES},
        num_warps=4,
        fp_fusion=False,
    )
    sizes = {"ALIGNED": 16, "HEADS": heads, "HEADS_P2": power_of_2(heads), "HEAD_DIM": 128, "DIM_P2": 128}
    spread_out = Case(
        name="ring_attention scales and sums",
        kernel=_spread_kernel,
        types={"origin": "*i8", "table": "*i64", "tiles": "*fp32"}
        | {"turns": "*fp32", "blocks": "i32", "longest": "i32"},
        constants=sizes,
        num_warps=4,
        fp_fusion=False,
    )
    return [queries, spread_out]
