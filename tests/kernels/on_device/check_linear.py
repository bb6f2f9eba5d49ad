"""The 8-bit product and its epilogue against float64 on the same quantized operands."""

from __future__ import annotations

import pytest
import torch
from where import DEVICE, FP8, relative_error

from lowvram_kernels.linear import reference_w8a8
from lowvram_kernels.rows import reference_rows
from lowvram_kernels.triton_linear import TILES, Tile, linear_triton
from lowvram_kernels.triton_linears import linears_triton

# Odd sizes; depths below, at and beyond a tile; more rows than a small launch takes.
SHAPES = [(1, 80, 216), (17, 81, 7), (33, 64, 64), (70, 256, 130), (5, 16, 1), (130, 300, 33)]
SMALL = Tile(32, 32, 32, 4, 2, parts=2)


def operands(shape, dtype, x_dtype=torch.float32):
    m, k, n = shape
    x, w, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    weight, weight_scale = reference_rows(w, dtype)
    return (t.to(DEVICE) for t in (x.to(x_dtype), weight, weight_scale[:, 0].contiguous(), bias))


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, *FP8])
@pytest.mark.parametrize("shape", SHAPES)
def test_meets_float64(shape, dtype, gelu):
    x, weight, weight_scale, bias = operands(shape, dtype)
    q, scale = reference_rows(x, dtype)
    out = linear_triton(q, scale, weight, weight_scale, bias, gelu=gelu, dtype=torch.float32, tile=SMALL)
    # Tensor cores sum fp8 products in fewer bits than float32.
    bound = 1e-5 if dtype is torch.int8 or DEVICE.type == "cpu" else 2e-3
    assert relative_error(out, reference_w8a8(x, weight, weight_scale, bias, gelu=gelu)) < bound


@pytest.mark.parametrize("generation", TILES)
def test_every_chips_tile(generation):
    if DEVICE.type == "cuda":
        pytest.skip("a chip runs its own tile only: the default one below")
    x, weight, weight_scale, _ = operands((140, 272, 260), torch.int8)
    q, scale = reference_rows(x, torch.int8)
    out = linear_triton(q, scale, weight, weight_scale, None, gelu=False, dtype=torch.float32, tile=TILES[generation])
    assert relative_error(out, reference_w8a8(x, weight, weight_scale, None)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [3, 65])
def test_default_tile_and_dtypes(dtype, rows):
    x, weight, weight_scale, bias = operands((rows, 96, 48), torch.int8, dtype)
    q, scale = reference_rows(x, torch.int8)
    out = linear_triton(q, scale, weight, weight_scale, bias.to(dtype), gelu=False, dtype=dtype)
    assert out.dtype is dtype
    expected = reference_w8a8(x, weight, weight_scale, bias.to(dtype))
    assert relative_error(out, expected) < torch.finfo(dtype).eps


def test_strided_operands():
    x, weight, weight_scale, bias = operands((20, 64, 24), torch.int8)
    q, scale = reference_rows(x, torch.int8)
    wide = torch.zeros(20, 96, dtype=torch.int8, device=DEVICE)
    wide[:, 16:80] = q
    strided = weight.t().contiguous().t()
    out = linear_triton(wide[:, 16:80], scale, strided, weight_scale, bias, gelu=False, dtype=torch.float32, tile=SMALL)
    assert relative_error(out, reference_w8a8(x, weight, weight_scale, bias)) < 1e-5


def test_largest_sums_stay_exact():
    depth = 13824
    q = torch.full((2, depth), 127, dtype=torch.int8, device=DEVICE)
    weight = torch.full((3, depth), -127, dtype=torch.int8, device=DEVICE)
    one = torch.ones(3, device=DEVICE)
    out = linear_triton(q, one[:2, None], weight, one, None, gelu=False, dtype=torch.float32, tile=SMALL)
    assert (out == -127.0 * 127 * depth).all()


def test_no_rows():
    _, weight, weight_scale, bias = operands((1, 16, 8), torch.int8)
    q = torch.empty(0, 16, dtype=torch.int8, device=DEVICE)
    scale = torch.empty(0, 1, device=DEVICE)
    assert linear_triton(q, scale, weight, weight_scale, bias, gelu=False, dtype=torch.bfloat16).shape == (0, 8)


def test_a_row_that_is_not_finite_shows():
    x, weight, weight_scale, bias = operands((4, 32, 8), torch.int8)
    x[1, 3] = float("nan")
    q, scale = reference_rows(x, torch.int8)
    out = linear_triton(q, scale, weight, weight_scale, bias, gelu=True, dtype=torch.bfloat16, tile=SMALL)
    assert out[1].isnan().all()
    assert out[2:].isfinite().all()


def several(rows, depth, columns, bias_dtype):
    """Rows, their scales, weight, its scales and bias of products of one width and depth."""
    products = []
    for count in rows:
        x, weight, weight_scale, bias = operands((count, depth, columns), torch.int8)
        bias = None if bias_dtype is None else bias.to(bias_dtype)
        products.append((*reference_rows(x, torch.int8), weight, weight_scale, bias))
    return products


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [((33, 33, 33), 64, 64), ((1, 40, 7), 80, 33), ((70, 5), 81, 130), ((0, 3, 65), 16, 1), ((20, 0, 0), 96, 48)],
)
def test_several_in_one_launch_equal_each_alone(rows, depth, columns, bias_dtype):
    products = several(rows, depth, columns, bias_dtype)
    together = linears_triton(products, dtype=torch.float32, tile=SMALL)
    assert [out.shape for out in together] == [(count, columns) for count in rows]
    for out, product in zip(together, products, strict=True):
        assert torch.equal(out, linear_triton(*product, gelu=False, dtype=torch.float32, tile=SMALL))


@pytest.mark.parametrize("rows", [(3, 2, 3), (65, 1, 20)])
def test_several_with_the_default_tile(rows):
    products = several(rows, 96, 48, torch.bfloat16)
    for out, (q, scale, weight, weight_scale, bias) in zip(
        linears_triton(products, dtype=torch.bfloat16), products, strict=True
    ):
        assert out.dtype is torch.bfloat16
        exact = (q.double() @ weight.double().t()) * scale.double() * weight_scale.double() + bias.double()
        if len(q):
            assert relative_error(out, exact) < torch.finfo(torch.bfloat16).eps


def test_several_of_no_rows():
    assert [len(out) for out in linears_triton(several((0, 0), 16, 8, None), dtype=torch.bfloat16)] == [0, 0]
