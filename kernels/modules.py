"""``nn.Module``s that a runtime swaps into a model in place of the plain ones."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from lowvram_kernels.attention import attention
from lowvram_kernels.linear import Operands, linear_q8, linear_w8a8
from lowvram_kernels.rope import norm_rope
from lowvram_kernels.rotation import check_group
from lowvram_kernels.rows import NAMES, check_smooth
from lowvram_kernels.trace import record

Tensor = torch.Tensor


class Attention(nn.Module):
    """The dispatcher as a module: q [..., L, N, H], k and v [..., S, N, H] -> [..., L, N, H]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v)


class QuantizedLinear(nn.Module):
    """W8A8 in place of ``nn.Linear``: ``weight`` int8 or fp8 [N, K], ``weight_scale`` float32 [N], ``bias`` [N].

    With ``gelu`` set, GELU (tanh) follows in the same kernel where there is one; see ``fold_gelu``. ``group`` above 1
    says that the weight's groups of so many input channels were rotated; see ``rotation``. ``smooth`` says that the
    weight was divided by a factor an input channel before, ``smooth_scale`` [K], by which inputs are multiplied.

    Raises:
        ValueError: inputs of this width and dtype cannot be rotated in such groups, or not be smoothed.
    """

    gelu = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        group: int = 1,
        smooth: bool = False,
    ):
        super().__init__()
        check_group(group, in_features, dtype)
        self.in_features, self.out_features, self.group = in_features, out_features, group
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(out_features, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        factors = nn.Parameter(torch.empty(in_features), requires_grad=False) if smooth else None
        self.smooth_scale = factors
        check_smooth(factors, in_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return linear_w8a8(
            x,
            self.weight,
            self.weight_scale,
            self.bias,
            gelu=self.gelu,
            group=self.group,
            smooth_K=self.smooth_scale,
        )

    def forward_quantized(self, q_MK: Tensor, scale_M1: Tensor, dtype: torch.dtype) -> Tensor:
        """The same for rows that an earlier pass smoothed and quantized (``norm_rows`` with this layer's ``group``),
        with the result in ``dtype``."""
        return linear_q8(q_MK, scale_M1, self.weight, self.weight_scale, self.bias, gelu=self.gelu, dtype=dtype)

    def operands(self, q_MK: Tensor, scale_M1: Tensor) -> Operands:
        """Such rows and what they are multiplied by, for ``linears_q8``."""
        return q_MK, scale_M1, self.weight, self.weight_scale, self.bias

    def extra_repr(self) -> str:
        turned = f", inputs rotated by {self.group}" if self.group > 1 else ""
        smoothed = ", inputs smoothed" if self.smooth_scale is not None else ""
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype}{smoothed}{turned}"


class NormRope(nn.Module):
    """RMSNorm over the width, the split in heads and, where a rope (with ``cos`` and ``sin``) is given, RoPE:
    [..., L, D] -> [..., L, N, H]. Takes over the ``weight`` [D] of the norm that it replaces."""

    def __init__(self, weight: nn.Parameter, num_heads: int, eps: float):
        super().__init__()
        self.weight, self.num_heads, self.eps = weight, num_heads, eps

    def forward(self, x: Tensor, rope: Any = None) -> Tensor:
        table = (None, None) if rope is None else (rope.cos, rope.sin)
        if x.ndim == 2:
            return norm_rope(x, self.weight, self.eps, self.num_heads, *table)
        out = norm_rope(x.reshape(-1, x.shape[-1]), self.weight, self.eps, self.num_heads, *table)
        return out.view(*x.shape[:-1], *out.shape[1:])


def swap_linear(parent: nn.Module, name: str, dtype: torch.dtype, *, group: int = 1, smooth: bool = False) -> None:
    """Replace ``parent.name``, an ``nn.Linear``, by an empty QuantizedLinear on the same device."""
    old = parent.get_submodule(name)
    if not isinstance(old, nn.Linear):
        raise TypeError(f"{name} is a {type(old).__name__}; only nn.Linear can become a QuantizedLinear")
    with torch.device(old.weight.device):
        new = QuantizedLinear(
            old.in_features, old.out_features, bias=old.bias is not None, dtype=dtype, group=group, smooth=smooth
        )
    parent.set_submodule(name, new)


def fold_gelu(layers: nn.Sequential) -> None:
    """Let each QuantizedLinear that GELU (tanh) follows apply it itself; the names in the state dict stay."""
    for index in range(len(layers) - 1):
        linear, activation = layers[index], layers[index + 1]
        if isinstance(linear, QuantizedLinear) and isinstance(activation, nn.GELU) and activation.approximate == "tanh":
            linear.gelu = True
            layers[index + 1] = nn.Identity()


def swap_conv(conv: nn.Module, dtype: torch.dtype) -> None:
    """Turn a convolution in place into one with 8-bit weights that are dequantized at use.

    The class's own padding and caching stay; only ``_conv_forward``, the hook that every ``nn.ConvNd`` calls with its
    weight, is replaced. ``weight`` becomes int8 or fp8 and ``weight_scale`` float32 [out] is added.
    """
    if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise TypeError(f"{type(conv).__name__} is no convolution that can take 8-bit weights")
    with torch.device(conv.weight.device):
        conv.weight = nn.Parameter(torch.empty(conv.weight.shape, dtype=dtype), requires_grad=False)
        conv.weight_scale = nn.Parameter(torch.empty(conv.weight.shape[0]), requires_grad=False)
    # A subclass and not a method on the instance: that would hold the layer, and its weights, in a cycle.
    conv.__class__ = _dequantizing(type(conv))  # type: ignore[arg-type]  # classes are hashable


@functools.cache
def _dequantizing(kind: type) -> type:
    class Dequantizing(kind):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            record("conv", f"{NAMES[weight.dtype]} weight, dequantized at use")
            full = dequantize_weight(weight, self.weight_scale, x.dtype)
            return super()._conv_forward(x, full, None if bias is None else bias.to(x.dtype))

    Dequantizing.__name__ = Dequantizing.__qualname__ = f"Dequantizing{kind.__name__}"
    return Dequantizing


def dequantize_weight(weight: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """weight * scale of its first dimension in ``dtype``, rounded once; keeps the memory format (channels last)."""
    scale = scale_N.view(-1, *[1] * (weight.ndim - 1))
    # Both are exact in bfloat16 and up, so the product is the only rounding; PyTorch multiplies in float32 and writes
    # ``dtype``, without a float32 copy in between on a GPU.
    narrow = weight if weight.dtype is torch.int8 else weight.to(dtype)
    return torch.mul(narrow, scale, out=torch.empty_like(weight, dtype=dtype))
