import pytest
import torch

from lowvram_kernels.attention import attention


@pytest.mark.parametrize("lead", [(), (3,)])
def test_against_float64(lead):
    q, k, v = torch.randn(*lead, 5, 2, 16), torch.randn(*lead, 9, 2, 16), torch.randn(*lead, 9, 2, 16)
    scores = torch.einsum("...lnh,...snh->...nls", q.double(), k.double()) / 4
    expected = torch.einsum("...nls,...snh->...lnh", scores.softmax(-1), v.double())
    out = attention(q, k, v)
    assert out.shape == expected.shape
    assert (out - expected).abs().max() < 1e-5


def test_no_key_is_refused():
    with pytest.raises(ValueError, match="at least one key"):
        attention(torch.ones(2, 1, 8), torch.ones(0, 1, 8), torch.ones(0, 1, 8))


def test_different_heads_are_refused():
    with pytest.raises(ValueError, match="equal heads"):
        attention(torch.ones(2, 2, 8), torch.ones(3, 1, 8), torch.ones(3, 1, 8))
