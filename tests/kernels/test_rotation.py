from __future__ import annotations

import pytest
import torch

from lowvram.simulate.device import SimulatedDevice
from lowvram_kernels import rotation
from lowvram_kernels.rotation import GROUP, SYLVESTER, check_group, largest_group, matrix, rotated

GROUPS = [2, 4, 8, 16, 32, 64, 128, 256, 512]


@pytest.mark.parametrize("group", GROUPS)
def test_a_rotation_is_orthogonal_and_its_own_inverse(group):
    turned = rotated(torch.eye(group, dtype=torch.float64), group)
    assert torch.allclose(turned @ turned.t(), torch.eye(group, dtype=torch.float64), atol=2e-15)
    assert torch.equal(turned, turned.t())
    assert torch.allclose(turned.abs(), torch.full_like(turned, group**-0.5))
    assert torch.allclose(turned, matrix(group), atol=1e-15)


@pytest.mark.parametrize("group", GROUPS)
def test_what_all_channels_share_stays_spread_in_large_groups(group):
    """A regular matrix's rows have the sum 1 or -1; with the 2 x 2 one behind it, some the square root of 2."""
    shared = rotated(torch.ones(group, dtype=torch.float64), group).abs().max().item()
    odd = group.bit_length() % 2 == 0
    assert shared == pytest.approx(group**0.5 if group <= SYLVESTER else 2**0.5 if odd else 1.0)


def test_groups_of_artifacts_that_are_there_stay_as_they_were():
    """Sylvester's, row by row: the sign of a product's entry is the parity of the bits that both numbers share."""
    for group in (2, 4, 8, 16):
        signs = [[(-1.0) ** (row & column).bit_count() for column in range(group)] for row in range(group)]
        assert torch.equal(matrix(group).float(), (torch.tensor(signs) * group**-0.5).float())


def test_more_rows_than_are_rotated_at_a_time_and_views():
    x = torch.randn(257, 33, 256)[:, 1:].transpose(0, 1)
    out = rotated(x, 256)
    assert out.shape == x.shape
    assert torch.allclose(out, (x.double() @ matrix(256)).float(), atol=1e-5)
    assert rotated(torch.empty(0, 512), 256).shape == (0, 512)


@pytest.mark.parametrize("group", [1, 4, 16, 32, 64, 256])
def test_a_product_stays_what_it_was(group):
    width = 768 if group > 16 else 48
    x, w = torch.randn(5, width, dtype=torch.float64), torch.randn(7, width, dtype=torch.float64)
    expected = x @ w.t()
    assert torch.allclose(rotated(x, group) @ rotated(w, group).t(), expected, rtol=1e-12, atol=1e-12)
    assert group == 1 or not torch.allclose(rotated(x, group) @ w.t(), expected, rtol=0.1)


@pytest.mark.parametrize("group", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(dtype, group):
    x = torch.randn(3, 5, 256).to(dtype)
    out = rotated(x, group)
    exact = x.double().view(-1, group) @ matrix(group)
    exact = exact.view(x.shape)
    assert out.dtype is dtype
    assert (out.double() - exact).norm() / exact.norm() < 2 * torch.finfo(dtype).eps


def test_groups_do_not_mix_and_rows_may_be_strided():
    x = torch.zeros(32, 2).t()
    x[:, 17] = 4.0
    out = rotated(x, 16)
    assert not out[:, :16].any()
    assert torch.equal(out[:, 16:].abs(), torch.ones(2, 16))


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_pass_and_matrices_of_inference_mode_serve_them(monkeypatch, group, dtype):
    monkeypatch.setattr(rotation, "_made", {})
    values = torch.randn(3, 256).to(dtype)
    with torch.inference_mode():
        expected = rotated(values, group).clone()
    x = torch.nn.Parameter(values)
    out = rotated(x, group)
    assert torch.allclose(out, expected, atol=1e-5)
    out.backward(values)
    assert torch.allclose(x.grad, expected, atol=1e-5)  # the matrix is symmetric


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
def test_a_second_call_copies_no_matrix(monkeypatch, group):
    monkeypatch.setattr(rotation, "_made", {})
    x = torch.randn(4, 512)
    first = rotated(x, group)
    monkeypatch.setattr(rotation, "_matrices", lambda _: pytest.fail("made again"))
    assert torch.equal(rotated(x, group), first)
    with pytest.raises(BaseException, match="made again"):
        rotated(x.bfloat16(), group)


@pytest.mark.parametrize("group", [16, 64, 128, 256])
def test_nothing_without_values_is_kept(monkeypatch, group):
    monkeypatch.setattr(rotation, "_made", {})
    assert rotated(torch.empty(4, 512, device="meta"), group).is_meta
    assert not rotation._made
    x = torch.randn(4, 512)
    rotated(x, group)
    for _ in range(2):  # nor are a real run's matrices taken in a simulated one
        with SimulatedDevice() as gpu:
            assert rotated(torch.empty(4, 512, device="meta"), group).is_meta
        assert gpu.h2d_bytes > 0
    assert {key[3].type for key in rotation._made} == {"cpu"}


def test_no_rotation_and_no_rows():
    x = torch.randn(3, 7)
    assert rotated(x, 1) is x
    assert rotated(torch.empty(0, 32), 16).shape == (0, 32)


def test_the_largest_group_that_fits():
    assert GROUP == 256
    assert [largest_group(width) for width in (5120, 13824, 384, 216, 6, 81)] == [256, 256, 128, 8, 2, 1]
    assert [largest_group(width, 16) for width in (5120, 384, 216, 81)] == [16, 16, 8, 1]


@pytest.mark.parametrize("group", [0, -2, 3, 12, 32])
def test_groups_that_do_not_fit_are_refused(group):
    with pytest.raises(ValueError, match="expected a power of two that divides 48"):
        check_group(group, 48)


def test_other_dtypes_are_refused():
    check_group(1, 48, torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="int8 rows only"):
        check_group(16, 48, torch.float8_e4m3fn)
