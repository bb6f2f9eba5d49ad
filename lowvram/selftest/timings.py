"""Rates of operations from the checks at the 14B's shapes: what a plan of this card need not assume."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lowvram.selftest.results import Result
from lowvram.selftest.trials import FULL

_LINEAR = 2 * FULL.tokens * FULL.width * FULL.ffn
_ATTENTION = 4 * FULL.tokens * FULL.width * sum(FULL.slots)
# Operation of a plan, and the checks of which it is made with what they compute: a block's two largest Linears, and its
# queries over a full ring.
_PARTS: dict[str, dict[str, int]] = {
    "int8 Linear": {"linear_w8a8 int8": _LINEAR, "linear_w8a8 int8 gelu": _LINEAR},
    "fp8 Linear": {"linear_w8a8 fp8": _LINEAR, "linear_w8a8 fp8 gelu": _LINEAR},
    "int8 attention": {"ring_attention": _ATTENTION},
    "16 or 32 bit attention": {"attention": _ATTENTION},
}


def operation_rates(results: Sequence[Result]) -> dict[str, float]:
    """Operations a second by their name in a plan, of the fastest backend that is right; of those alone whose every
    part was timed."""
    found = {}
    for name, parts in _PARTS.items():
        seconds = [_fastest(results, check) for check in parts]
        if all(seconds):
            found[name] = sum(parts.values()) / sum(each for each in seconds if each)
    return found


def _fastest(results: Iterable[Result], operation: str) -> float | None:
    timed = [
        result.seconds
        for result in results
        if result.subject.operation == operation
        and result.subject.size == FULL.name
        and result.status == "passed"
        and result.seconds
    ]
    return min(timed, default=None)
