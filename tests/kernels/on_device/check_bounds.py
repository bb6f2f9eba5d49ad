"""Where kernels are interpreted, an access outside of their tensors is a fault: all checks run under this."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from where import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="only the interpreter checks bounds")


@triton.jit
def _copy(x, out, LOADED: tl.constexpr, STORED: tl.constexpr):
    at = tl.arange(0, 32)
    tl.store(out + at, tl.load(x + at, mask=at < LOADED, other=0.0), mask=at < STORED)


@triton.jit
def _reach(x, table, out):
    tl.store(out, tl.load(x + tl.load(table)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_one_element_too_far_is_a_fault(dtype):
    x, out = torch.ones(20, dtype=dtype), torch.zeros(24, dtype=dtype)
    _copy[(1,)](x, out, LOADED=20, STORED=24)
    assert out.sum() == 20
    with pytest.raises(Exception, match=r"load of . bytes at .* outside"):
        _copy[(1,)](x, out, LOADED=21, STORED=24)
    with pytest.raises(Exception, match=r"store of . bytes at .* outside"):
        _copy[(1,)](x, out, LOADED=20, STORED=25)


def test_before_the_first_element_too():
    x, out = torch.ones(32), torch.zeros(32)
    with pytest.raises(Exception, match="outside"):
        _reach[(1,)](x, torch.tensor([-(1 << 20)]), out)


def test_another_tensor_is_reached_by_a_table_only():
    x, other, out = torch.ones(32), torch.full((32,), 7.0), torch.zeros(32)
    distance = (other.data_ptr() - x.data_ptr()) // 4
    _reach[(1,)](x, torch.tensor([distance]), out)
    assert out[0] == 7
