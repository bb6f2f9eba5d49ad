from __future__ import annotations

import pytest
import torch

from lowvram_kernels.rotation import GROUP, check_group, largest_group, rotated


@pytest.mark.parametrize("group", [2, 8, 16, 128])
def test_a_rotation_is_orthogonal_and_its_own_inverse(group):
    matrix = rotated(torch.eye(group, dtype=torch.float64), group)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(group, dtype=torch.float64), atol=1e-15)
    assert torch.equal(matrix, matrix.t())
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, group**-0.5))


@pytest.mark.parametrize("group", [1, 4, 16])
def test_a_product_stays_what_it_was(group):
    x, w = torch.randn(5, 48, dtype=torch.float64), torch.randn(7, 48, dtype=torch.float64)
    expected = x @ w.t()
    assert torch.allclose(rotated(x, group) @ rotated(w, group).t(), expected, rtol=1e-12, atol=1e-12)
    assert group == 1 or not torch.allclose(rotated(x, group) @ w.t(), expected, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(dtype):
    x = torch.randn(3, 5, 64).to(dtype)
    out = rotated(x, 16)
    exact = rotated(x.double(), 16)
    assert out.dtype is dtype
    assert (out.double() - exact).norm() / exact.norm() < torch.finfo(dtype).eps


def test_groups_do_not_mix_and_rows_may_be_strided():
    x = torch.zeros(32, 2).t()
    x[:, 17] = 4.0
    out = rotated(x, 16)
    assert not out[:, :16].any()
    assert torch.equal(out[:, 16:].abs(), torch.ones(2, 16))


def test_no_rotation_and_no_rows():
    x = torch.randn(3, 7)
    assert rotated(x, 1) is x
    assert rotated(torch.empty(0, 32), 16).shape == (0, 32)


def test_the_largest_group_that_fits():
    assert GROUP == 16
    assert [largest_group(width) for width in (5120, 13824, 216, 6, 81)] == [16, 16, 8, 2, 1]


@pytest.mark.parametrize("group", [0, -2, 3, 12, 32])
def test_groups_that_do_not_fit_are_refused(group):
    with pytest.raises(ValueError, match="expected a power of two that divides 48"):
        check_group(group, 48)


def test_other_dtypes_are_refused():
    check_group(1, 48, torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="int8 rows only"):
        check_group(16, 48, torch.float8_e4m3fn)
