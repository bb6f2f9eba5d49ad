import pytest
import torch
from torch import nn

from lowvram_kernels.modules import QuantizedLinear, swap_conv, swap_linear
from lowvram_kernels.rows import quantize_rows


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(6, 5, 3, padding=1), lambda: nn.Conv3d(6, 5, (1, 2, 2), stride=2)])
def test_swapped_conv_computes_with_the_dequantized_weight(dtype, make):
    conv = make()
    x = torch.randn(1, 6, *(4,) * (conv.weight.ndim - 2))
    q, scale = quantize_rows(conv.weight.detach().flatten(1), dtype)
    exact = type(conv).forward(conv, x)
    full = (q.float() * scale).view(conv.weight.shape)
    expected = conv._conv_forward(x, full, conv.bias)
    swap_conv(conv, dtype)
    conv.weight.data, conv.weight_scale.data = q.view(conv.weight.shape), scale[:, 0].contiguous()
    out = conv(x)
    assert torch.allclose(out, expected, atol=1e-6)
    assert not torch.equal(out, exact)


def test_swapped_conv_keeps_a_subclass_and_its_padding():
    class Causal(nn.Conv3d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (0, 0, 0, 0, 2, 0)))

    conv = Causal(2, 2, (3, 1, 1))
    swap_conv(conv, torch.int8)
    conv.weight.data.zero_()
    assert isinstance(conv, Causal)
    assert conv(torch.zeros(1, 2, 4, 3, 3)).shape == (1, 2, 4, 3, 3)


def test_swapped_linear_keeps_its_name_and_shape():
    model = nn.Sequential(nn.Linear(8, 4), nn.GELU())
    swap_linear(model, "0", torch.int8)
    assert isinstance(model[0], QuantizedLinear)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {
        "0.weight": (4, 8),
        "0.weight_scale": (4,),
        "0.bias": (4,),
    }


def test_only_linears_and_convs_are_swapped():
    with pytest.raises(TypeError, match=r"only nn\.Linear"):
        swap_linear(nn.Sequential(nn.GELU()), "0", torch.int8)
    with pytest.raises(TypeError, match="no convolution"):
        swap_conv(nn.Linear(2, 2), torch.int8)
