"""Rows of zeros, as those behind a padded prompt: the kernels below, which quantize or read what was, make no NaN.

Each runs over float32 rows of which some or all are zeros, once at each of the groups named; what an encoded ring and
its scales stand in held NaN before. Inputs in bfloat16 are not tried here.
"""

from __future__ import annotations

import pytest
import torch
from where import DEVICE, FP8

from lowvram_kernels.projected import Projected, TurnedSink
from lowvram_kernels.ring_codec import KVBlock, SlotLayout, set_value_scales
from lowvram_kernels.rope import Projection
from lowvram_kernels.rows import reference_rows
from lowvram_kernels.triton_attention import Tile, ring_attention_triton
from lowvram_kernels.triton_linear import linear_triton
from lowvram_kernels.triton_linears import linears_triton
from lowvram_kernels.triton_norm import fused_triton
from lowvram_kernels.triton_projected import attend_projected_triton
from lowvram_kernels.triton_rope import encode_keys_triton, norm_both_triton, norm_rope_triton, rotated_keys_triton
from lowvram_kernels.triton_rows import quantize_rows_triton
from lowvram_kernels.triton_values import encode_values_triton

TOKENS, HEADS, HEAD_DIM, WIDTH, EPS = 6, 2, 16, 256, 1e-6
SMALL = Tile(32, 4, 2)
INNER = HEADS * HEAD_DIM


def rows(zeros, width=WIDTH):
    x = torch.randn(TOKENS, width, device=DEVICE)
    x[zeros] = 0
    return x


def quantized(zeros, dtype, group=1):
    return quantize_rows_triton(rows(zeros), dtype, group)


def normed(zeros, dtype, group=1):
    x, y = rows(zeros), rows(zeros)
    gate, gain, offset = (torch.randn(WIDTH, device=DEVICE) for _ in range(3))
    offset.zero_()  # so that a row of zeros is one behind the norm as well
    return [part for part in fused_triton(x, y, gate, gain, offset, EPS, dtype, None, group) if part is not None]


def product(zeros, dtype, group=1, gelu=True):
    weight, scale = reference_rows(rows(zeros), dtype, group)
    q, row_scale = reference_rows(rows(zeros), dtype, group)
    return [linear_triton(q, row_scale, weight, scale[:, 0].contiguous(), None, gelu=gelu, dtype=torch.float32)]


def products(zeros):
    weight, scale = reference_rows(rows(zeros), torch.int8)
    one = (*reference_rows(rows(zeros), torch.int8), weight, scale[:, 0].contiguous(), None)
    return linears_triton([one, one], dtype=torch.float32)


def projection(zeros):
    return Projection(rows(zeros, INNER), torch.randn(INNER, device=DEVICE), EPS)


def tables():
    angle = torch.rand(TOKENS, HEAD_DIM // 2, device=DEVICE)
    return angle.cos(), angle.sin()


def heads(zeros):
    return rows(zeros, INNER).view(TOKENS, HEADS, HEAD_DIM)


def block(zeros) -> KVBlock:
    layout = SlotLayout(tokens=TOKENS, heads=HEADS, head_dim=HEAD_DIM)
    out = layout.block(torch.full((layout.nbytes + 16,), 255, dtype=torch.uint8, device=DEVICE))  # bfloat16's NaN
    out.k_mean.copy_(heads(zeros).mean(0))
    encode_keys_triton(heads(zeros), out)
    set_value_scales(heads(zeros), out)
    encode_values_triton(heads(zeros), out)
    return out


def attended(zeros):
    own = Projected(projection(zeros), projection(zeros), heads(zeros), *tables())
    blocks = [block(zeros), block(zeros)]
    out = attend_projected_triton(own, 0, blocks, TurnedSink(block(zeros), *tables()), SMALL)
    return [out, *vars(blocks[0]).values()]


KERNELS = {
    **{f"quantize_rows by {g}": lambda z, g=g: quantized(z, torch.int8, g) for g in (1, 16, 64, 128, 256)},
    **{f"norm by {g}": lambda z, g=g: normed(z, torch.int8, g) for g in (1, 16, 256)},
    **{f"quantize_rows {dtype}": lambda z, d=dtype: quantized(z, d) for dtype in FP8},
    **{f"norm {dtype}": lambda z, d=dtype: normed(z, d) for dtype in (*FP8, torch.bfloat16)},
    **{f"product by {g}": lambda z, g=g: product(z, torch.int8, g) for g in (1, 256)},
    **{f"product {dtype}": lambda z, d=dtype: product(z, d) for dtype in FP8},
    "products": products,
    "norm_rope": lambda z: [norm_rope_triton(rows(z, INNER), torch.ones(INNER, device=DEVICE), EPS, HEADS, *tables())],
    "norm_both": lambda z: norm_both_triton(projection(z), projection(z), HEADS),
    "encode": lambda z: list(vars(block(z)).values()),
    "rotated keys": lambda z: [rotated_keys_triton(block(z), *tables())],
    "ring_attention": lambda z: [ring_attention_triton(heads(z)[None], [[block(z), block(z)]], SMALL)],
    "attend_projected": attended,
}


@pytest.mark.parametrize("zeros", [slice(3, None), slice(None)], ids=["some", "all"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_zeros_stay_finite(kernel, zeros):
    for part in KERNELS[kernel](zeros):
        assert part.float().isfinite().all()
        if zeros == slice(None) and not part.is_floating_point():
            assert not part.any()
