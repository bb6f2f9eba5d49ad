"""Trace of the kernels that ran for each operation, so that a run's report can say so and no fallback stays silent."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar

_active: ContextVar[Counter[tuple[str, str]] | None] = ContextVar("kernel_trace", default=None)


@contextlib.contextmanager
def trace_kernels() -> Iterator[Counter[tuple[str, str]]]:
    """Count (operation, kernel) pairs of everything that runs inside."""
    counts: Counter[tuple[str, str]] = Counter()
    token = _active.set(counts)
    try:
        yield counts
    finally:
        _active.reset(token)


def record(operation: str, kernel: str, calls: int = 1) -> None:
    counts = _active.get()
    if counts is not None:
        counts[operation, kernel] += calls
