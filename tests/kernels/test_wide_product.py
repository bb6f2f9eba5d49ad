"""8-bit products in float32: exact where they are said to be, and within their bound elsewhere."""

from __future__ import annotations

import pytest
import torch

from lowvram_kernels import wide_product as room
from lowvram_kernels.wide_product import wide_product


def whole(shape, low=-127, high=128):
    return torch.randint(low, high, shape, dtype=torch.int8)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1040, 7), (33, 257, 64), (0, 16, 4), (3, 0, 4)])
def test_int8_is_exact_up_to_1040_channels(shape):
    m, k, n = shape
    q, weight = whole((m, k)), whole((n, k))
    assert torch.equal(wide_product(q, weight).long(), q.long() @ weight.long().t())


def test_the_largest_sums_of_1040_channels_are_exact():
    q, weight = whole((2, 1040), 127, 128), whole((3, 1040), -127, -126)
    assert torch.equal(wide_product(q, weight).long(), q.long() @ weight.long().t())
    assert 127 * 127 * 1040 <= 2**24 < 127 * 127 * 1041


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_deeper_sums_are_within_the_bound(dtype):
    depth = 13824
    q, weight = ((torch.rand(n, depth) * 126 + 1).to(dtype) for n in (3, 5))  # all of one sign: the largest sums
    exact = q.double() @ weight.double().t()
    error = (wide_product(q, weight).double() - exact).abs()
    assert (error <= depth * 2.0**-24 * exact).all()
    assert error.max() > 0  # such sums do round: the bound is not held by chance


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_tiles_leave_the_product_as_it_is(monkeypatch, dtype):
    q, weight = (torch.randn(n, 96).mul(20).to(dtype) for n in (9, 50))
    at_once = wide_product(q, weight)
    monkeypatch.setattr(room, "TILE_BYTES", 7 * 4 * 96)
    bound = 0 if dtype is torch.int8 else 96 * 2.0**-24 * (q.float().abs() @ weight.float().abs().t()).max()
    assert (wide_product(q, weight) - at_once).abs().max() <= bound


def test_a_large_weight_is_never_widened_as_a_whole(monkeypatch):
    made = []
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args: made.append(args[1]) or new_empty(*args))
    monkeypatch.setattr(room, "TILE_BYTES", 64 * 4 * 10)
    wide_product(whole((2, 64)), whole((95, 64)))
    assert made == [(2, 95), (10, 64)]
