"""Every tile of the 8-bit product and of attention that may be worth a try, timed on the card at hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from lowvram_kernels.ring_codec import KVBlock
from lowvram_kernels.rows import quantize_rows

Tensor = torch.Tensor
Stopwatch = Callable[[Callable[[], Any]], float]
"""Median milliseconds of a call."""


@torch.inference_mode()
def tuned(stopwatch: Stopwatch, rows: int, queries: Tensor, blocks: list[KVBlock]) -> dict[str, Any]:
    """Times of the alternatives to the tiles in ``TILES``; those that do not fit the chip say so.

    ``rows`` of the product; ``queries`` bfloat16 [1, L, N, H] attend to ``blocks``.
    """
    from lowvram_kernels import triton_attention, triton_linear

    x = torch.randn(rows, 5120, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(13824, 5120, device="cuda", dtype=torch.bfloat16)
    (q, scale), (q_weight, weight_scale) = quantize_rows(x, torch.int8), quantize_rows(weight, torch.int8)
    operands = (q, scale, q_weight, weight_scale[:, 0].contiguous(), None)

    def product(tile: Any) -> Any:
        return triton_linear.linear_triton(*operands, gelu=False, dtype=torch.bfloat16, tile=tile)

    products = [
        triton_linear.Tile(m, n, k, warps, stages, parts)
        for m, n in ((128, 128), (128, 256), (256, 128), (64, 256))
        for k in (64, 128)
        for warps in (4, 8)
        for stages in (2, 3, 4)
        for parts in (1, 2)
    ]
    attentions = [
        triton_attention.Tile(queries, warps, stages)
        for queries in (32, 64, 128)
        for warps in (4, 8)
        for stages in (2, 3, 4)
    ]
    return {
        "linear int8": timed(stopwatch, products, product),
        "ring_attention": timed(
            stopwatch, attentions, lambda tile: triton_attention.ring_attention_triton(queries, [blocks], tile)
        ),
    }


def timed(stopwatch: Stopwatch, tiles: list[Any], call: Callable[[Any], Any]) -> list[dict[str, Any]]:
    from triton.runtime.errors import OutOfResources

    rows = []
    for tile in tiles:
        try:
            rows.append({"tile": str(tile), "ms": stopwatch(lambda tile=tile: call(tile))})
        except OutOfResources as error:
            rows.append({"tile": str(tile), "ms": None, "error": str(error).splitlines()[0]})
    return sorted(rows, key=lambda row: math.inf if row["ms"] is None else row["ms"])
