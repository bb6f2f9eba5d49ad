import pytest
import torch

from lowvram_kernels.rows import QMAX, quantize_rows


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
