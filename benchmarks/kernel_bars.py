"""What the kernels are to reach on a card, beside what they were found to: the last part of ``kernels.py``'s result."""

from __future__ import annotations

from typing import Any

LINEAR, ON_GEFORCE, ELSEWHERE, VAE = 1.5, 1.3, 1.0, 2.0


def bars_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a whole result. ``found`` is the poorest of a kind's rows, times as fast as what it is compared with."""
    geforce = "geforce" in result["gpu"].lower()
    products = [row["speedup"]["int8 rotated"] for row in result["linear"]]
    rows = (
        ("int8 Linear, rotated, against cuBLAS in bf16", LINEAR, min(products)),
        (
            "attention over int8 rings against the fastest in bf16",
            ON_GEFORCE if geforce else ELSEWHERE,
            result["attention"]["speedup"],
        ),
        ("the VAE's decoder against diffusers' own", VAE, result["vae"]["speedup"]),
    )
    return [{"bar": name, "expected": bar, "found": found, "met": found >= bar} for name, bar, found in rows]
