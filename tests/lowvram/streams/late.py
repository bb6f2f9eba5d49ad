"""Copies at the last moment that their order allows: what does not wait for one finds other bytes there."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tests.lowvram.streams.fake_cuda import COMPUTE, HOST, INWARDS, OUTWARDS, Registered

Tensor = torch.Tensor
Point = tuple[str, int]
"""A side stream, and how much had been asked of it."""


class Late:
    """A ``fake_cuda.Model``: what is computed runs at once, a copy when somebody waits for it."""

    def __init__(self) -> None:
        self._asked: dict[str, list[Any]] = {INWARDS: [], OUTWARDS: []}
        self._done = {INWARDS: 0, OUTWARDS: 0}
        self._pinned = Registered()

    def computed(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        pass

    def copy(self, stream: str, dst: Tensor, src: Tensor) -> None:
        if stream == INWARDS and not self._pinned.holds(src.untyped_storage().data_ptr()):
            src = src.clone()  # the driver takes a pageable copy's bytes before the call returns
        self._asked[stream].append((dst, src))
        if stream == OUTWARDS and not self._pinned.holds(dst.untyped_storage().data_ptr()):
            self._run(stream, len(self._asked[stream]))

    def recorded(self, stream: str) -> Point | None:
        return None if stream == COMPUTE else (stream, len(self._asked[stream]))

    def waits(self, stream: str, point: Point | None) -> None:
        if point is None:
            return
        if stream in (COMPUTE, HOST):
            self._run(*point)
        else:
            self._asked[stream].append(point)

    def synchronized(self) -> None:
        for stream, asked in self._asked.items():
            self._run(stream, len(asked))

    def registered(self, address: int, nbytes: int) -> None:
        self._pinned.add(address, nbytes)

    def unregistered(self, address: int) -> None:
        self._pinned.drop(address)

    def _run(self, stream: str, count: int) -> None:
        asked = self._asked[stream]
        while self._done[stream] < count:
            first, second = asked[self._done[stream]]
            asked[self._done[stream]] = None
            self._done[stream] += 1
            if isinstance(first, str):
                self._run(first, second)
            else:
                with _disable_current_modes():  # the side stream's own work, whoever waits for it just now
                    first.copy_(second)
