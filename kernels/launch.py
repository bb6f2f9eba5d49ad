"""Launches of Triton kernels. On ``meta``, where tensors have no values, a launch is told of and not made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

_told: ContextVar[tuple[Callable[[str], None], ...]] = ContextVar("told_of_launches", default=())


def launch(kernel: Any, grid: tuple[int, ...], first: torch.Tensor, /, *args: Any, **options: Any) -> None:
    """``kernel[grid](first, *args, **options)``; on ``meta`` whoever listens in this thread is told instead.

    ``first`` says where: it is on the device of all the tensors, so that a launch on ``meta`` keeps none on a card from
    being made, in this thread or in another one.
    """
    if first.is_meta:
        for tell in _told.get():
            tell(kernel.__name__)
        return
    kernel[grid](first, *args, **options)


@contextlib.contextmanager
def telling(tell: Callable[[str], None]) -> Iterator[None]:
    """Call ``tell`` with the kernel's name at every launch on ``meta`` in this thread; those that listen already go on
    to."""
    token = _told.set((*_told.get(), tell))
    try:
        yield
    finally:
        _told.reset(token)
