from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowvram_kernels import choices, linear
from lowvram_kernels.choices import INT_MM, SCALED_MM
from lowvram_kernels.linear import fp8_weight_only, linear_q8, linear_w8a8, linears_q8, reference_w8a8
from lowvram_kernels.rotation import rotated
from lowvram_kernels.rows import NAMES, quantize_rows
from lowvram_kernels.trace import trace_kernels

SHAPES = [(1, 80, 216), (17, 81, 7), (33, 64, 64), (128, 257, 96), (5, 16, 1)]
DTYPES = [torch.int8, torch.float8_e4m3fn]


def make(shape, dtype, seed=0):
    m, k, n = shape
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    q, scale = quantize_rows(w, dtype)
    return x, w, q, scale[:, 0], torch.randn(n, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_meets_reference(shape, dtype):
    x, _, q, scale, bias = make(shape, dtype)
    out = linear_w8a8(x, q, scale, bias)
    expected = reference_w8a8(x, q, scale, bias)
    assert (out.double() - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.int8, 0.012), (torch.float8_e4m3fn, 0.045)])
def test_reference_against_float64(dtype, bound):
    x, w, q, scale, bias = make((64, 512, 256), dtype)
    exact = x.double() @ w.double().t() + bias
    error = (reference_w8a8(x, q, scale, bias) - exact).norm() / exact.norm()
    assert 0 < error < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_leading_dimensions_strides_and_dtypes(dtype, x_dtype):
    x, _, q, scale, _ = make((24, 48, 40), dtype)
    strided = x.t().contiguous().t().view(2, 12, 48).to(x_dtype)
    out = linear_w8a8(strided, q, scale, None)
    assert out.shape == (2, 12, 40)
    assert out.dtype is x_dtype
    expected = reference_w8a8(x.to(x_dtype), q, scale, None)
    assert (out.view(24, 40).double() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype):
    _, _, q, scale, bias = make((4, 16, 8), dtype)
    assert linear_w8a8(torch.empty(0, 16), q, scale, bias).shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_give_the_bias_and_nan_stays_visible(dtype):
    x, _, q, scale, bias = make((4, 16, 8), dtype)
    x[0] = 0
    x[1, 3] = float("nan")
    out = linear_w8a8(x, q, scale, bias)
    assert torch.equal(out[0], bias)
    assert out[1].isnan().all()
    assert out[2:].isfinite().all()


def test_bad_operands_are_refused():
    x, w, q, scale, bias = make((4, 16, 8), torch.int8)
    with pytest.raises(TypeError, match="int8 or float8"):
        linear_w8a8(x, w, scale, bias)
    with pytest.raises(TypeError, match="quantizes float32"):
        linear_w8a8(x.int(), q, scale, bias)
    with pytest.raises(ValueError, match="do not fit"):
        linear_w8a8(x[:, :8], q, scale, bias)
    with pytest.raises(ValueError, match="one for each output channel"):
        linear_w8a8(x, q, scale[:4], bias)


def test_trace_names_the_kernel():
    x, _, q, scale, bias = make((4, 16, 8), torch.int8)
    with trace_kernels() as counts:
        linear_w8a8(x, q, scale, bias)
        linear_w8a8(x, q, scale, bias)
    chosen = choices.choose("linear_w8a8 int8", x.device)
    assert counts == {("quantize_rows", "int8: torch"): 2, ("linear_w8a8", f"int8: {chosen}"): 2}


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_behind_the_product(dtype):
    x, _, q, scale, bias = make((9, 32, 24), dtype)
    out = linear_w8a8(x, q, scale, bias, gelu=True)
    assert (out - F.gelu(linear_w8a8(x, q, scale, bias), approximate="tanh")).abs().max() < 1e-5
    expected = reference_w8a8(x, q, scale, bias, gelu=True)
    assert (out.double() - expected).norm() / expected.norm() < 1e-5


def take_8_bit_product(dtype):
    operation, backend = f"linear_w8a8 {NAMES[dtype]}", {torch.int8: INT_MM, torch.float8_e4m3fn: SCALED_MM}[dtype]
    if backend not in choices.backends(operation, torch.device("cpu")):
        pytest.skip(f"{backend} is wrong on this processor, or missing")
    choices.prefer(operation, backend, torch.device("cpu"), "this test is about it")


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bit_weights_never_run_as_a_wider_product_where_their_own_is_taken(dtype, monkeypatch):
    take_8_bit_product(dtype)

    def refuse(*_args, **_kwargs):
        raise AssertionError("a wider product ran")

    monkeypatch.setattr(F, "linear", refuse)
    monkeypatch.setattr(torch, "matmul", refuse)
    monkeypatch.setattr(torch.Tensor, "__matmul__", refuse)
    x, _, q, scale, bias = make((9, 32, 24), dtype)
    assert linear_w8a8(x.bfloat16(), q, scale, bias).dtype is torch.bfloat16


def test_quantized_rows_that_do_not_fit_are_refused():
    x, _, q, scale, bias = make((4, 16, 8), torch.int8)
    rows, row_scale = quantize_rows(x, torch.int8)
    with pytest.raises(TypeError, match="for both"):
        linear_q8(x, row_scale, q, scale, bias, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"\[M, 1\]"):
        linear_q8(rows, row_scale[:, 0], q, scale, bias, dtype=torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        linear_q8(rows[:, :8], row_scale, q, scale, bias, dtype=torch.float32)


def several(shapes, dtypes, biases):
    """Operands of products, one for each shape."""
    products = []
    for index, (shape, dtype, bias) in enumerate(zip(shapes, dtypes, biases, strict=True)):
        x, _, weight, weight_scale, values = make(shape, dtype, seed=index)
        rows, scale = quantize_rows(x, dtype)
        products.append((rows, scale, weight, weight_scale, None if bias is None else values.to(bias)))
    return products


I8, FP8, F32, BF16 = torch.int8, torch.float8_e4m3fn, torch.float32, torch.bfloat16
# Shapes (rows, depth, columns), weights, biases; whether one launch can take them all.
TOGETHER = [
    ([(9, 32, 24)] * 3, [I8] * 3, [F32] * 3, True),
    ([(9, 32, 24), (4, 32, 24)], [I8] * 2, [None] * 2, True),
    ([(9, 32, 24), (0, 32, 24), (1, 32, 24)], [I8] * 3, [BF16] * 3, True),
    ([(9, 32, 24)], [I8], [F32], False),
    ([(9, 32, 24)] * 4, [I8] * 4, [F32] * 4, False),
    ([(9, 32, 24), (9, 32, 8)], [I8] * 2, [F32] * 2, False),
    ([(9, 32, 24), (9, 16, 24)], [I8] * 2, [F32] * 2, False),
    ([(9, 32, 24)] * 2, [I8] * 2, [F32, None], False),
    ([(9, 32, 24)] * 2, [I8] * 2, [F32, BF16], False),
    ([(9, 32, 24)] * 2, [FP8] * 2, [F32] * 2, False),
    ([(9, 32, 24)] * 2, [I8, FP8], [F32] * 2, False),
]


@pytest.fixture
def ran(monkeypatch):
    """Which products were asked for alone, and how many in one launch, where ``choose`` finds Triton for all."""
    pytest.importorskip("triton", reason="triton is not installed: there is no launch for several")
    from lowvram_kernels import triton_linears

    ran = []
    monkeypatch.setattr(linear, "choose", lambda operation, device: choices.TRITON)
    monkeypatch.setattr(linear, "_product", lambda *operands: ran.append(1))
    monkeypatch.setattr(triton_linears, "linears_triton", lambda products, dtype: ran.append(len(products)))
    return ran


@pytest.mark.parametrize(("shapes", "dtypes", "biases", "together"), TOGETHER)
def test_several_products_go_together_where_they_fit(shapes, dtypes, biases, together, ran):
    linears_q8(several(shapes, dtypes, biases), dtype=torch.float32)
    assert ran == ([len(shapes)] if together else [1] * len(shapes))


@pytest.mark.parametrize("off", ["linears_w8a8 int8", "linear_w8a8 int8"])
def test_where_either_kernel_is_switched_off_products_run_one_by_one(off, ran, monkeypatch):
    monkeypatch.setattr(linear, "choose", lambda name, device: choices.ONE_BY_ONE if name == off else choices.TRITON)
    linears_q8(several([(9, 32, 24)] * 2, [I8] * 2, [None] * 2), dtype=torch.float32)
    assert ran == [1, 1]


@pytest.mark.parametrize(("shapes", "dtypes", "biases"), [case[:3] for case in TOGETHER])
def test_several_products_equal_each_alone(shapes, dtypes, biases):
    products = several(shapes, dtypes, biases)
    with trace_kernels() as counts:
        outs = linears_q8(products, dtype=torch.float32)
    for out, product in zip(outs, products, strict=True):
        assert torch.equal(out, linear_q8(*product, dtype=torch.float32))
    assert sum(counts.values()) == len(products)


def test_several_products_of_which_one_does_not_fit_are_refused():
    good, bad = several([(9, 32, 24)] * 2, [I8] * 2, [None] * 2)
    with pytest.raises(ValueError, match="do not fit"):
        linears_q8([good, (bad[0][:, :8], *bad[1:])], dtype=torch.float32)


def test_weight_only_fp8_is_close_to_the_full_product():
    x, w, q, scale, bias = make((16, 128, 32), torch.float8_e4m3fn)
    exact = x.double() @ w.double().t() + bias
    assert (fp8_weight_only(x, q, scale, bias) - exact).norm() / exact.norm() < 0.04


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("shape", [(1, 128, 256), (300, 256, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_meets_reference_on_a_gpu(shape, dtype):
    x, _, q, scale, bias = make(shape, dtype)
    out = linear_w8a8(x.cuda().bfloat16(), q.cuda(), scale.cuda(), bias.cuda())
    expected = reference_w8a8(x.bfloat16(), q, scale, bias)
    assert (out.cpu().double() - expected).norm() / expected.norm() < 1e-2


def outliers(group: int) -> tuple[float, float]:
    """Errors of a product whose input has one channel 40 times as large: against float64, and of the kernel alone."""
    x, w, *_ = make((64, 256, 96), torch.int8)
    x[:, 77] *= 40
    w[:, 77] /= 40
    q, scale = quantize_rows(rotated(w, group), torch.int8)
    out = linear_w8a8(x, q, scale[:, 0], None, group=group).double()
    exact, expected = x.double() @ w.double().t(), reference_w8a8(x, q, scale[:, 0], None, group=group)
    return ((out - exact).norm() / exact.norm()).item(), ((out - expected).norm() / expected.norm()).item()


def test_rotated_weights_and_inputs_give_the_product_with_less_of_an_outliers_error():
    plain, turned = outliers(1), outliers(16)
    assert 0.001 < turned[0] < 0.6 * plain[0] < 0.6
    assert max(plain[1], turned[1]) < 1e-5


def test_a_group_that_does_not_fit_is_refused():
    for dtype, message in ((torch.int8, "divides 24"), (torch.float8_e4m3fn, "int8 rows only")):
        x, _, q, scale, bias = make((4, 24 if dtype is torch.int8 else 32, 8), dtype)
        with pytest.raises(ValueError, match=message):
            linear_w8a8(x, q, scale, bias, group=16)
