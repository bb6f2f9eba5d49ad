"""Values of a block in 8 bits as attention reads them: in tiles of 128 tokens, channel by channel."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from lowvram_kernels.aot import Case
from lowvram_kernels.launch import launch
from lowvram_kernels.ring_codec import TILE_TOKENS, KVBlock
from lowvram_kernels.triton_rows import power_of_2, row_warps, to_8bit

Tensor = torch.Tensor

RING_TILE = tl.constexpr(TILE_TOKENS)
# Tokens that a program holds at a time: half a tile is as much as a token of all of the 14B's heads.
PART = tl.constexpr(64)


@triton.jit
def store_tile(
    v, stride_t, step, q, sums, head, tile, tokens, HEAD_DIM: tl.constexpr, DIM_P2: tl.constexpr
):  # fmt: skip
    """A tile of one head. ``v`` are the head's values [tokens, head_dim], ``stride_t`` apart; ``step``, ``q`` and
    ``sums`` the block's ``v_scale``, ``v`` and ``v_sums``."""
    dims = tl.arange(0, DIM_P2)
    real = dims < HEAD_DIM
    size = tl.load(step + head * HEAD_DIM + dims, mask=real, other=1.0).to(tl.float32)
    inverse = tl.div_rn(tl.full((DIM_P2,), 1.0, tl.float32), size)
    row = (head * tl.cdiv(tokens, RING_TILE) + tile).to(tl.int64) * HEAD_DIM
    total = tl.zeros((DIM_P2,), tl.int32)
    for part in tl.static_range(RING_TILE // PART):
        inside = tl.arange(0, PART) + part * PART
        token = tile * RING_TILE + inside
        there = (token < tokens)[:, None] & real[None, :]
        value = tl.load(v + token.to(tl.int64)[:, None] * stride_t + dims[None, :], mask=there, other=0.0)
        byte = to_8bit(value.to(tl.float32) * inverse[None, :], True)
        total += tl.sum(byte.to(tl.int32), 0)
        place = q + (row + dims)[:, None] * RING_TILE + inside[None, :]
        tl.store(place, tl.trans(byte), mask=real[:, None])
    tl.store(sums + row + dims, total.to(tl.int16), mask=real)


@triton.jit
def _encode_kernel(
    v, step, q, sums, tokens, stride_t, stride_n, HEAD_DIM: tl.constexpr, DIM_P2: tl.constexpr
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    store_tile(v + head.to(tl.int64) * stride_n, stride_t, step, q, sums, head, tile, tokens, HEAD_DIM, DIM_P2)


def encode_values_triton(v_TNH: Tensor, out: KVBlock) -> None:
    """By the scales in ``out.v_scale``, which are there."""
    v_TNH = v_TNH if v_TNH.stride(2) == 1 else v_TNH.contiguous()
    tokens, heads, head_dim = v_TNH.shape
    launch(
        _encode_kernel,
        (out.v.shape[1], heads),
        v_TNH,
        out.v_scale,
        out.v,
        out.v_sums,
        tokens,
        v_TNH.stride(0),
        v_TNH.stride(1),
        HEAD_DIM=head_dim,
        DIM_P2=power_of_2(head_dim),
        num_warps=row_warps(TILE_TOKENS // 2 * power_of_2(head_dim)),
        enable_fp_fusion=False,  # rounds where PyTorch rounds
    )


def aot_cases(generation: int) -> list[Case]:
    return _aot_cases("*bf16", "i32:16")


def more_aot_cases(generation: int) -> list[Case]:
    return [dataclasses.replace(case, name=f"{case.name} odd") for case in _aot_cases("*fp32", "i32")]


def _aot_cases(v: str, tokens: str) -> list[Case]:
    types = {"v": v, "step": "*bf16", "q": "*i8", "sums": "*i16", "tokens": tokens}
    return [
        Case(
            name="encode_kv values",
            kernel=_encode_kernel,
            types=types | {"stride_t": "i32:16", "stride_n": "i32:16"},
            constants={"HEAD_DIM": 128, "DIM_P2": 128},
            num_warps=row_warps(TILE_TOKENS // 2 * 128),
            fp_fusion=False,
        ),
    ]
