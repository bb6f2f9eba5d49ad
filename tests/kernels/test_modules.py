import pytest
import torch
from torch import nn

from lowvram_kernels.modules import QuantizedLinear, dequantize_weight, fold_gelu, swap_conv, swap_linear
from lowvram_kernels.rotation import rotated
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


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_dequantized_weight_is_rounded_once_and_keeps_channels_last(dtype, out_dtype):
    weight = (torch.randn(4, 3, 1, 2, 2) * 40).to(dtype)
    scale = torch.rand(4)
    out = dequantize_weight(weight, scale, out_dtype)
    assert torch.equal(out, (weight.float() * scale.view(-1, 1, 1, 1, 1)).to(out_dtype))
    last = weight.to(memory_format=torch.channels_last_3d)
    assert dequantize_weight(last, scale, out_dtype).is_contiguous(memory_format=torch.channels_last_3d)


def quantized_sequence(approximate):
    layers = nn.Sequential(nn.Linear(8, 12), nn.GELU(approximate=approximate), nn.Linear(12, 4))
    for name in ("0", "2"):
        plain = layers.get_submodule(name)
        q, scale = quantize_rows(plain.weight.detach(), torch.int8)
        swap_linear(layers, name, torch.int8)
        new = layers.get_submodule(name)
        new.weight.data, new.weight_scale.data, new.bias.data = q, scale[:, 0].contiguous(), plain.bias.detach()
    return layers


def test_folded_gelu_computes_the_same_under_the_same_names():
    layers, x = quantized_sequence("tanh"), torch.randn(5, 8)
    expected, names = layers(x), list(layers.state_dict())
    fold_gelu(layers)
    assert isinstance(layers[1], nn.Identity)
    assert [layer.gelu for layer in (layers[0], layers[2])] == [True, False]
    assert torch.equal(layers(x), expected)
    assert list(layers.state_dict()) == names


def test_another_activation_is_not_folded():
    layers = quantized_sequence("none")
    fold_gelu(layers)
    assert isinstance(layers[1], nn.GELU)
    assert not layers[0].gelu


@pytest.mark.parametrize("gelu", [False, True])
def test_rows_quantized_before_give_the_same(gelu):
    layers, x = quantized_sequence("tanh"), torch.randn(5, 8)
    layers[0].gelu = gelu
    assert torch.equal(layers[0].forward_quantized(*quantize_rows(x, torch.int8), x.dtype), layers[0](x))


def test_a_layer_rotates_its_inputs_as_its_weight_was():
    plain, x = nn.Linear(32, 6), torch.randn(5, 32)
    x[:, 3] *= 30
    model = nn.Sequential(plain)
    swap_linear(model, "0", torch.int8, group=16)
    q, scale = quantize_rows(rotated(plain.weight.detach(), 16), torch.int8)
    model[0].weight.data, model[0].weight_scale.data, model[0].bias.data = q, scale[:, 0], plain.bias.detach()
    out = model(x)
    assert (out - plain(x)).norm() / plain(x).norm() < 0.02
    assert torch.equal(model[0].forward_quantized(*quantize_rows(x, torch.int8, group=16), x.dtype), out)
    assert "rotated by 16" in repr(model[0])


@pytest.mark.parametrize(("width", "dtype"), [(24, torch.int8), (32, torch.float8_e4m3fn)])
def test_a_layer_that_cannot_be_rotated_is_refused(width, dtype):
    with pytest.raises(ValueError, match="groups of 16"):
        QuantizedLinear(width, 4, bias=False, dtype=dtype, group=16)
