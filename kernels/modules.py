"""``nn.Module``s that a runtime swaps into a model in place of the plain ones."""

from __future__ import annotations

import types

import torch
from torch import nn

from lowvram_kernels.attention import attention
from lowvram_kernels.linear import linear_w8a8
from lowvram_kernels.trace import record

Tensor = torch.Tensor


class Attention(nn.Module):
    """The dispatcher as a module: q [..., L, N, H], k and v [..., S, N, H] -> [..., L, N, H]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v)


class QuantizedLinear(nn.Module):
    """W8A8 in place of ``nn.Linear``: ``weight`` int8 or fp8 [N, K], ``weight_scale`` float32 [N], ``bias`` [N]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(out_features, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear_w8a8(x, self.weight, self.weight_scale, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype}"


def swap_linear(parent: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Replace ``parent.name``, an ``nn.Linear``, by an empty QuantizedLinear on the same device."""
    old = parent.get_submodule(name)
    if not isinstance(old, nn.Linear):
        raise TypeError(f"{name} is a {type(old).__name__}; only nn.Linear can become a QuantizedLinear")
    with torch.device(old.weight.device):
        new = QuantizedLinear(old.in_features, old.out_features, bias=old.bias is not None, dtype=dtype)
    parent.set_submodule(name, new)


def swap_conv(conv: nn.Module, dtype: torch.dtype) -> None:
    """Turn a convolution in place into one with 8-bit weights that are dequantized at use.

    The class stays (its own padding and caching with it); only ``_conv_forward``, the hook that every ``nn.ConvNd``
    calls with its weight, is replaced. ``weight`` becomes int8 or fp8 and ``weight_scale`` float32 [out] is added.
    """
    if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise TypeError(f"{type(conv).__name__} is no convolution that can take 8-bit weights")
    device = conv.weight.device
    conv.weight = nn.Parameter(torch.empty(conv.weight.shape, dtype=dtype, device=device), requires_grad=False)
    conv.weight_scale = nn.Parameter(torch.empty(conv.weight.shape[0], device=device), requires_grad=False)
    conv._conv_forward = types.MethodType(_dequantized_conv_forward, conv)


def _dequantized_conv_forward(conv, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kernel = "int8" if weight.dtype is torch.int8 else "fp8"
    record("conv", f"{kernel} weight, dequantized at use")
    scale = conv.weight_scale.view(-1, *[1] * (weight.ndim - 1))
    full = (weight.float() * scale).to(x.dtype)
    return type(conv)._conv_forward(conv, x, full, None if bias is None else bias.to(x.dtype))
