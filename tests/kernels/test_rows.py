import pytest
import torch

from lowvram_kernels.rotation import rotated
from lowvram_kernels.rows import QMAX, quantize_rows
from lowvram_kernels.trace import trace_kernels


@pytest.mark.parametrize(("dtype", "step"), [(torch.int8, 0.5), (torch.float8_e4m3fn, 16.0)])
def test_round_trip_stays_within_half_a_step(dtype, step):
    x = torch.randn(37, 53)
    q, scale = quantize_rows(x, dtype)
    assert q.dtype is dtype
    assert ((q.float() * scale - x).abs() <= step * scale * 1.0001).all()
    assert torch.allclose(q.float().abs().amax(1), torch.full((37,), QMAX[dtype]))


def test_int8_never_uses_minus_128():
    q, _ = quantize_rows(torch.tensor([[-1.0, 1.0, -1.00001]]), torch.int8)
    assert q.min() == -127


def test_zero_row_stays_zero():
    q, scale = quantize_rows(torch.zeros(2, 8), torch.int8)
    assert (scale > 0).all()
    assert not q.any()


def test_unknown_dtype_is_refused():
    with pytest.raises(TypeError, match="known are"):
        quantize_rows(torch.ones(1, 1), torch.int16)


@pytest.mark.parametrize(
    ("shape", "group"), [((3, 16), 16), ((7, 80), 16), ((2, 4, 32), 32), ((5, 192), 64), ((2, 768), 256)]
)
def test_rotated_rows_against_float64(shape, group):
    x = torch.randn(shape).flatten(0, -2)
    before = x.clone()
    q, scale = quantize_rows(x, torch.int8, group=group)
    assert torch.equal(x, before)
    exact = rotated(x.double(), group)
    assert ((q.double() * scale - exact).abs() <= 0.5001 * scale).all()
    assert torch.equal(q.abs().amax(1), torch.full((len(x),), 127, dtype=torch.int8))


def test_rotation_spreads_a_large_channel():
    x = torch.randn(40, 64)
    x[:, 5] *= 50
    errors = []
    for group in (1, 16):
        q, scale = quantize_rows(x, torch.int8, group=group)
        errors.append((rotated(q * scale, group) - x)[:, 6:].norm().item())
    assert errors[1] < 0.6 * errors[0]


def test_rotation_is_told_and_refused_where_it_cannot_be():
    with trace_kernels() as counts:
        quantize_rows(torch.randn(2, 32), torch.int8, group=16)
    assert counts == {("quantize_rows", "int8 rotated by 16: torch"): 1}
    assert quantize_rows(torch.empty(0, 32), torch.int8, group=16)[0].shape == (0, 32)
    with pytest.raises(ValueError, match="divides 24"):
        quantize_rows(torch.randn(2, 24), torch.int8, group=16)
    with pytest.raises(ValueError, match="int8 rows only"):
        quantize_rows(torch.randn(2, 32), torch.float8_e4m3fn, group=16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("group", [16, 64])
def test_a_rotated_row_that_is_not_finite_shows_and_one_of_zeros_stays(value, group):
    x = torch.randn(3, 64)
    x[1, 4], x[2] = value, 0
    q, scale = quantize_rows(x, torch.int8, group=group)
    assert scale.isfinite().flatten().tolist() == [True, False, True]
    assert not q[2].any()
