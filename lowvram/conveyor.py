"""Staging slots on the device, filled ahead of their use in a known order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator

import torch

from lowvram.engine import Engine, Moment

Tensor = torch.Tensor
# Copies one thing into a slot, not before the moments given; returns the moment when it is there.
Fill = Callable[[Tensor, tuple[Moment, ...]], Moment]


class Conveyor:
    """``take`` gives the next thing of ``jobs``, which is already on its way; ``release`` frees its slot for another.

    Things have to be taken in the order of ``jobs`` and released in that order too.
    """

    def __init__(self, engine: Engine, slots: list[Tensor]):
        self._engine, self._slots = engine, slots
        self._free: deque[tuple[int, tuple[Moment, ...]]] = deque((i, ()) for i in range(len(slots)))
        self._coming: deque[tuple[Hashable, int, Moment]] = deque()
        self._taken: deque[tuple[Hashable, int]] = deque()
        self._jobs: Iterator[tuple[Hashable, Fill]] = iter(())

    def load(self, jobs: Iterator[tuple[Hashable, Fill]]) -> None:
        """Set what comes next; everything of before has to be released."""
        self._jobs = jobs
        self._fill()

    def take(self, key: Hashable) -> Tensor:
        """The slot that holds ``key``; what is computed from here on waits for it.

        Raises:
            RuntimeError: ``key`` is not what comes next, or every slot is taken.
        """
        if not self._coming or self._coming[0][0] != key:
            raise RuntimeError(f"{key} was to be taken, but {[k for k, _, _ in self._coming]} is on its way")
        _, slot, there = self._coming.popleft()
        self._engine.wait(there)
        self._taken.append((key, slot))
        return self._slots[slot]

    def release(self, key: Hashable, *moments: Moment) -> None:
        """Let ``key``'s slot be filled again, once everything computed so far, and ``moments``, are done."""
        taken, slot = self._taken.popleft()
        if taken != key:
            raise RuntimeError(f"{key} was to be released, but {taken} was taken first")
        self._free.append((slot, (self._engine.now(), *moments)))
        self._fill()

    def _fill(self) -> None:
        while self._free:
            job = next(self._jobs, None)
            if job is None:
                return
            slot, free = self._free.popleft()
            key, fill = job
            self._coming.append((key, slot, fill(self._slots[slot], free)))
