"""Activations as the layers behind them want them: in 8 bit, made once for all that want them alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import nn

from lowvram_kernels.chips import has_fp8_units
from lowvram_kernels.linear import linears_q8
from lowvram_kernels.modules import NormRope, QuantizedLinear
from lowvram_kernels.rope import Projection
from lowvram_kernels.rows import quantize_rows
from lowvram_models.attention import HeadNorm

Tensor = torch.Tensor
Rows = Sequence[Tensor | None]
"""Activations [L, D] in the dtype to compute in and None, or in 8 bit and their scale a row."""


class Wanted(TypedDict):
    """What a layer wants its input in: 8 bit where it multiplies in 8 bit, in groups rotated as its weight's were."""

    dtype: torch.dtype
    group: int


def wanted(layer: nn.Module, dtype: torch.dtype) -> Wanted:
    """``dtype`` where the layer does not multiply in 8 bit."""
    if not isinstance(layer, QuantizedLinear):
        return Wanted(dtype=dtype, group=1)
    computes = layer.weight.dtype is torch.int8 or has_fp8_units(layer.weight.device)
    return Wanted(dtype=layer.weight.dtype if computes else dtype, group=layer.group)


def rows_for(layer: nn.Module, x_LD: Tensor, made: dict[Any, Any]) -> Rows:
    """``x`` as ``layer`` wants its input; ``made`` keeps what was made of ``x`` for others."""
    how = wanted(layer, x_LD.dtype)
    if how["dtype"] is x_LD.dtype:
        return x_LD, None
    key = tuple(how.values())
    if key not in made:
        made[key] = quantize_rows(x_LD, how["dtype"], group=how["group"])
    rows: Rows = made[key]
    return rows


def linear(layer: Any, rows: Rows, dtype: torch.dtype) -> Tensor:
    """A layer over rows as it wants them, in ``dtype``."""
    values, scale = rows
    out: Tensor = layer(values) if scale is None else layer.forward_quantized(values, scale, dtype)
    return out


def linears(products: Sequence[tuple[Any, Rows]], dtype: torch.dtype) -> list[Tensor]:
    """Several layers, each over its rows: what is all in 8 bit takes one launch where there is one."""
    ready = [layer.operands(*rows) for layer, rows in products if rows[1] is not None and not layer.gelu]
    if len(ready) == len(products):
        return linears_q8(ready, dtype=dtype)
    return [linear(layer, rows, dtype) for layer, rows in products]


def projection(norm: HeadNorm | NormRope, x_LD: Tensor) -> Projection:
    return Projection(x_LD, norm.weight, norm.eps)
