"""Preparation of attention over encoded blocks: where the blocks lie, 8-bit queries, scales in reading order.

A table tells where the parts of each block are, so that slots of rings, staging buffers and the sink are read where
they lie. A row of it: the distances in bytes of k, v, k_scale, v_scale and k_mean from the first block's keys, and the
number of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lowvram_kernels.aot import Case
from lowvram_kernels.holding import hold
from lowvram_kernels.ring_codec import KVBlock
from lowvram_kernels.rounding import round_up
from lowvram_kernels.triton_rows import magnitude_bits, power_of_2, quantize_scales, to_8bit
from lowvram_kernels.uploads import upload

Tensor = torch.Tensor

QUERIES = 32  # of one program
PAD_TOKENS = 128  # a multiple of every tile's keys
MAX_HEAD_DIM = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """``q8`` int8 [I, N, L, H], ``q_scale`` float32 [I, N, L] and ``q_mean`` (q . k_mean) float32 [I, B, N, L], both
    scaled for exp2; ``scales`` float32 [I, B, 2, N, tokens padded] of keys and values; ``table`` int64 [I * B, 6] and
    ``aligned``, of which all its distances are multiples. What is float or 8-bit holds nothing yet where ``room_for``
    made it.
    """

    origin: Tensor
    table: Tensor
    aligned: int
    q8: Tensor
    q_scale: Tensor
    q_mean: Tensor
    scales: Tensor


@triton.jit
def block_part(origin, table, entry, field: tl.constexpr, ALIGNED: tl.constexpr):
    """Address of a block's part by its distance in bytes from ``origin``: a multiple of ALIGNED, for k and v of 16."""
    distance = tl.load(table + entry * 6 + field)
    distance = tl.multiple_of(distance, 16 if field < 2 else ALIGNED)
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
        k_mean = block_part(origin, table, item * blocks + block, 4, ALIGNED).to(tl.pointer_type(tl.bfloat16))
        mean = tl.load(k_mean + head * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        dot = tl.sum(value * mean[None, :], 1) * softmax_scale
        line = ((item * blocks + block) * HEADS + head).to(tl.int64) * queries + rows
        tl.store(q_mean + line, dot, mask=rows < queries)


@triton.jit
def _scales_kernel(
    origin,
    table,
    scales,
    padded,
    ALIGNED: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_P2: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Scales of keys and of values, [T, N] bfloat16 each, to float32 [2, N, padded]: read in a row by one head."""
    block = tl.program_id(1)
    token, head = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, HEADS_P2)
    there = (token < tl.load(table + block * 6 + 5))[:, None] & (head < HEADS)[None, :]
    for which in tl.static_range(2):
        part = block_part(origin, table, block, 2 + which, ALIGNED).to(tl.pointer_type(tl.bfloat16))
        value = tl.load(part + token[:, None] * HEADS + head[None, :], mask=there, other=0.0).to(tl.float32)
        line = ((block * 2 + which) * HEADS).to(tl.int64) * padded
        at = scales + line + head[:, None] * padded + token[None, :]
        tl.store(at, tl.trans(value), mask=(head < HEADS)[:, None] & (token < padded)[None, :])


def dim_p2(head_dim: int) -> int:
    return max(16, power_of_2(head_dim))


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
    longest = max(block.tokens for some in lists for block in some)
    table, aligned = _table(device, tuple(_row(block, origin.data_ptr()) for some in lists for block in some))
    ready = Prepared(
        origin=origin,
        table=hold(table),
        aligned=aligned,
        q8=torch.empty((items, heads, queries, head_dim), dtype=torch.int8, device=device),
        q_scale=torch.empty((items, heads, queries), dtype=torch.float32, device=device),
        q_mean=torch.empty((items, blocks, heads, queries), dtype=torch.float32, device=device),
        scales=torch.empty((items, blocks, 2, heads, _padded(longest)), dtype=torch.float32, device=device),
    )
    return ready, torch.empty((items, queries, heads, head_dim), dtype=dtype, device=device)


def softmax_scale(head_dim: int) -> float:
    return math.log2(math.e) / math.sqrt(head_dim)


def prepare_queries(q_ILNH: Tensor, ready: Prepared) -> None:
    items, queries, heads, head_dim = q_ILNH.shape
    q_ILNH = q_ILNH if q_ILNH.stride(3) == 1 else q_ILNH.contiguous()
    _prepare_kernel[(-(-queries // QUERIES), heads, items)](
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


def spread_scales(ready: Prepared) -> None:
    """Of all blocks; those that a launch writes have to be written before."""
    items, blocks, _, heads, padded = ready.scales.shape
    _scales_kernel[(padded // PAD_TOKENS, items * blocks)](
        ready.origin,
        ready.table,
        ready.scales,
        padded,
        ALIGNED=ready.aligned,
        HEADS=heads,
        HEADS_P2=power_of_2(heads),
        BLOCK_T=PAD_TOKENS,
        num_warps=4,
        enable_fp_fusion=False,
    )


def _padded(tokens: int) -> int:
    return round_up(tokens, PAD_TOKENS)


def _row(block: KVBlock, origin: int) -> tuple[int, ...]:
    parts = (block.k, block.v, block.k_scale, block.v_scale, block.k_mean)
    if not all(part.is_contiguous() for part in parts) or block.k.data_ptr() % 16 or block.v.data_ptr() % 16:
        raise ValueError(
            "a block's parts have to be contiguous, k and v at multiples of 16 bytes: use a SlotLayout where tokens * "
            "heads * head_dim is such a multiple, over a slot that starts at one"
        )
    return (*(part.data_ptr() - origin for part in parts), block.tokens)


@functools.lru_cache(maxsize=4096)
def _table(device: torch.device, rows: tuple[tuple[int, ...], ...]) -> tuple[Tensor, int]:
    # Kept, because a ring's slots come round, and with them their addresses.
    aligned = 16 if all(distance % 16 == 0 for row in rows for distance in row[:5]) else 2
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
    scales = Case(
        name="ring_attention scales",
        kernel=_scales_kernel,
        types={"origin": "*i8", "table": "*i64", "scales": "*fp32", "padded": "i32:16"},
        constants={"ALIGNED": 16, "HEADS": heads, "HEADS_P2": power_of_2(heads), "BLOCK_T": PAD_TOKENS},
        num_warps=4,
        fp_fusion=False,
    )
    return [queries, scales]
