"""8-bit matrix product with everything that follows it in the epilogue: scales, bias and GELU."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from lowvram_kernels.aot import Case
from lowvram_kernels.chips import known_generation
from lowvram_kernels.launch import launch

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program computes, [m, n] in steps of ``parts`` times k, and its warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    parts: int = 1


# From the table of compiled kernels: the largest tile without spilled registers that fits the chip's shared memory;
# ``benchmarks/kernels.py --tune`` measures the alternatives on a card. Two products a step (``parts``) keep the
# compiler from carrying operands from step to step on sm_8x, where each byte of them takes a register of its own.
TILES = {
    80: Tile(128, 256, 64, 8, 4, parts=2),
    86: Tile(128, 256, 64, 8, 3, parts=2),
    89: Tile(128, 256, 64, 8, 3, parts=2),
    90: Tile(128, 256, 128, 8, 4),
    120: Tile(128, 256, 128, 8, 3),
}
FEW_ROWS = Tile(64, 128, 64, 4, 3, parts=2)
# A wgmma may run on into the next step only where a step has one; with an int32 sum Triton waits for each (``Rule 2.1``
# of its WGMMAPipeline.cpp), so that fp8 alone overlaps there (not measured on a card).
FEW_ROWS_90 = Tile(64, 128, 128, 4, 3)


@triton.jit
def gelu_tanh(x):
    # 0.5 (1 + tanh(z)) is sigmoid(2 z)
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _tile_of(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of tiles. Programs go down GROUP_M tiles of rows before the next tile of columns, so that both
    operands stay in L2."""
    group = program // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m = first_m + (program % (GROUP_M * tiles_n)) % height
    tile_n = (program % (GROUP_M * tiles_n)) // height
    return tile_m, tile_n


@triton.jit
def product_tile(
    program,
    x,
    weight,
    out,
    x_scale,
    weight_scale,
    bias,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The ``program``-th tile of a product."""
    tile_m, tile_n = _tile_of(program, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    # Tile corners in 64 bits, offsets from them in 32: far fewer registers than a 64-bit offset for each element.
    first_row, first_column = tile_m * BLOCK_M, tile_n * BLOCK_N
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_there, column_there = rows < M - first_row, columns < N - first_column
    depth = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read the first one; their results are not stored.
    x_at = x + first_row.to(tl.int64) * stride_xm + tl.where(row_there, rows, 0)[:, None] * stride_xm + depth[None, :]
    w_from = weight + first_column.to(tl.int64) * stride_wn
    w_at = w_from + tl.where(column_there, columns, 0)[None, :] * stride_wn + depth[:, None]

    # Named to tl.dot too: Triton 3.7.1 would take float32 for the result whatever the accumulator is.
    SUM: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    product = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    for start in range(0, K, BLOCK_K * PARTS):
        for part in tl.static_range(PARTS):
            if EVEN_K:
                a, b = tl.load(x_at), tl.load(w_at)
            else:
                left = depth < K - start - part * BLOCK_K
                a = tl.load(x_at, mask=left[None, :], other=0.0)
                b = tl.load(w_at, mask=left[:, None], other=0.0)
            product = tl.dot(a, b, product, out_dtype=SUM)
            x_at += BLOCK_K
            w_at += BLOCK_K

    row_scale = tl.load(x_scale + first_row + rows, mask=row_there, other=0.0)
    column_scale = tl.load(weight_scale + first_column + columns, mask=column_there, other=0.0)
    value = product.to(tl.float32) * row_scale[:, None] * column_scale[None, :]
    if HAS_BIAS:
        value += tl.load(bias + first_column + columns, mask=column_there, other=0.0).to(tl.float32)[None, :]
    if GELU:
        value = gelu_tanh(value)
    corner = out + first_row.to(tl.int64) * N + first_column
    at = corner + rows[:, None] * N + columns[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=row_there[:, None] & column_there[None, :])


@triton.jit
def _linear_kernel(
    x,
    weight,
    out,
    x_scale,
    weight_scale,
    bias,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    product_tile(
        tl.program_id(0),
        x,
        weight,
        out,
        x_scale,
        weight_scale,
        bias,
        M,
        N,
        K,
        stride_xm,
        stride_wn,
        HAS_BIAS,
        GELU,
        EVEN_K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        GROUP_M,
        PARTS,
    )


def tile_for(generation: int, rows: int) -> Tile:
    if rows > 64:
        return TILES[generation]
    return FEW_ROWS_90 if generation == 90 else FEW_ROWS


def linear_triton(
    q_MK: Tensor,
    scale_M1: Tensor,
    weight_NK: Tensor,
    weight_scale_N: Tensor,
    bias_N: Tensor | None,
    *,
    gelu: bool,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """[M, K] and [N, K], both int8 or both fp8 -> [M, N] in ``dtype``; operands as ``linear.linear_q8`` checks them."""
    (rows, depth), columns = q_MK.shape, len(weight_NK)
    out = torch.empty((rows, columns), dtype=dtype, device=q_MK.device)
    if not out.numel():
        return out
    tile = tile or tile_for(known_generation(q_MK.device), rows)
    q_MK, weight_NK = (t if t.stride(1) == 1 else t.contiguous() for t in (q_MK, weight_NK))
    grid = (-(-rows // tile.m) * -(-columns // tile.n),)
    launch(
        _linear_kernel,
        grid,
        q_MK,
        weight_NK,
        out,
        scale_M1,
        weight_scale_N,
        weight_scale_N if bias_N is None else bias_N,
        rows,
        columns,
        depth,
        q_MK.stride(0),
        weight_NK.stride(0),
        HAS_BIAS=bias_N is not None,
        GELU=gelu,
        EVEN_K=depth % (tile.k * tile.parts) == 0,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP_M=8,
        PARTS=tile.parts,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return out


def aot_case(name: str, operand: str, tile: Tile, *, gelu: bool = False, odd: bool = False) -> Case:
    """``odd``: a number of rows that is no multiple of 16, with bias and result in float32."""
    out = "*fp32" if odd else "*bf16"
    types = {"x": operand, "weight": operand, "out": out}
    types |= dict.fromkeys(("x_scale", "weight_scale"), "*fp32") | {"bias": out}
    types |= dict.fromkeys(("N", "K", "stride_xm", "stride_wn"), "i32:16") | {"M": "i32" if odd else "i32:16"}
    constants = {"HAS_BIAS": True, "GELU": gelu, "EVEN_K": True, "GROUP_M": 8, "PARTS": tile.parts}
    constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    return Case(
        name=name,
        kernel=_linear_kernel,
        types=types,
        constants=constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def aot_cases(generation: int) -> list[Case]:
    cases = []
    for operand in ("*i8", "*fp8e4nv") if generation >= 89 else ("*i8",):
        kind = "int8" if operand == "*i8" else "fp8"
        cases.append(aot_case(f"linear {kind}", operand, TILES[generation]))
        cases.append(aot_case(f"linear {kind} gelu", operand, TILES[generation], gelu=True))
        cases.append(aot_case(f"linear {kind} few rows", operand, tile_for(generation, 64)))
        cases.append(aot_case(f"linear {kind} odd", operand, TILES[generation], odd=True))
    return cases


def more_aot_cases(generation: int) -> list[Case]:
    kinds = {"int8": "*i8"} | ({"fp8": "*fp8e4nv"} if generation >= 89 else {})
    return [
        aot_case(
            f"linear {kind}{' gelu' if gelu else ''}{' few rows' if rows == 1 else ''} odd",
            operand,
            tile_for(generation, rows),
            gelu=gelu,
            odd=True,
        )
        for kind, operand in kinds.items()
        for gelu, rows in ((True, 65), (False, 1), (True, 1))
    ]
