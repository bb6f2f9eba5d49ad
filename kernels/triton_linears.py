"""Up to three 8-bit matrix products of one width and depth in one launch: those of queries, keys and values.

Their weights lie apart, and so may their rows: a program picks the operands of the product that its tile belongs to.
That spares two launches, and the end of a product, where only a few of its tiles are left, is the next one's beginning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lowvram_kernels.aot import Case
from lowvram_kernels.chips import known_generation
from lowvram_kernels.launch import launch
from lowvram_kernels.triton_linear import TILES, Tile, product_tile, tile_for
from lowvram_kernels.triton_rows import packed

Tensor = torch.Tensor
MOST = 3
_OPERANDS = ("x", "weight", "out", "x_scale", "weight_scale", "bias")


@triton.jit
def of_three(which, a, b, c):
    return tl.where(which == 0, a, tl.where(which == 1, b, c))


@triton.jit
def _linears_kernel(
    x0,
    x1,
    x2,
    weight0,
    weight1,
    weight2,
    out0,
    out1,
    out2,
    x_scale0,
    x_scale1,
    x_scale2,
    weight_scale0,
    weight_scale1,
    weight_scale2,
    bias0,
    bias1,
    bias2,
    M0,
    M1,
    M2,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Three products of one width and depth, packed, in one grid, tiles behind tiles; the last may have no rows."""
    program = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    second = tl.cdiv(M0, BLOCK_M) * tiles_n
    third = second + tl.cdiv(M1, BLOCK_M) * tiles_n
    which = (program >= second).to(tl.int32) + (program >= third).to(tl.int32)
    product_tile(
        program - of_three(which, 0, second, third),
        of_three(which, x0, x1, x2),
        of_three(which, weight0, weight1, weight2),
        of_three(which, out0, out1, out2),
        of_three(which, x_scale0, x_scale1, x_scale2),
        of_three(which, weight_scale0, weight_scale1, weight_scale2),
        of_three(which, bias0, bias1, bias2),
        of_three(which, M0, M1, M2),
        N,
        K,
        K,
        K,
        HAS_BIAS,
        False,
        EVEN_K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        GROUP_M,
        PARTS,
    )


def linears_triton(
    products: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]],
    *,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> list[Tensor]:
    """[M, N] in ``dtype`` of each product's (rows [M, K], their scales, weight [N, K], its scales, bias): two or three
    of them, as ``linear.side_by_side`` finds them to fit."""
    outs = [torch.empty((len(x), len(w)), dtype=dtype, device=x.device) for x, _, w, _, _ in products]
    (columns, depth), rows = products[0][2].shape, [len(product[0]) for product in products]
    if not columns or not any(rows):
        return outs
    tile = tile or tile_for(known_generation(products[0][0].device), max(rows))
    rows += [0] * (MOST - len(rows))
    operands = [
        (packed(x), packed(w), out, x_scale, w_scale, w_scale if bias is None else bias)
        for (x, x_scale, w, w_scale, bias), out in zip(products, outs, strict=True)
    ]
    operands += operands[:1] * (MOST - len(operands))
    tiles = sum(-(-some // tile.m) for some in rows) * -(-columns // tile.n)
    launch(
        _linears_kernel,
        (tiles,),
        *(one for of_a_kind in zip(*operands, strict=True) for one in of_a_kind),
        *rows,
        columns,
        depth,
        HAS_BIAS=products[0][4] is not None,
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
    return outs


def aot_case(name: str, tile: Tile, *, odd: bool = False) -> Case:
    """``odd``: numbers of rows that are no multiples of 16, with bias and results in float32."""
    out = "*fp32" if odd else "*bf16"
    kinds = dict(zip(_OPERANDS, ("*i8", "*i8", out, "*fp32", "*fp32", out), strict=True)) | {
        "M": "i32" if odd else "i32:16"
    }
    types = {f"{name}{index}": kind for name, kind in kinds.items() for index in range(MOST)}
    constants = {"HAS_BIAS": True, "EVEN_K": True, "GROUP_M": 8, "PARTS": tile.parts}
    constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    return Case(
        name=name,
        kernel=_linears_kernel,
        types=types | {"N": "i32:16", "K": "i32:16"},
        constants=constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def aot_cases(generation: int) -> list[Case]:
    return [aot_case("linears int8", TILES[generation])]


def more_aot_cases(generation: int) -> list[Case]:
    few = tile_for(generation, 1)
    return [
        aot_case("linears int8 odd", TILES[generation], odd=True),
        aot_case("linears int8 few rows", few),
        aot_case("linears int8 few rows odd", few, odd=True),
    ]
