"""Prefetch: staging slots on the device, filled ahead of their use in a known order."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator

import torch

from lowvram.offload.copy_engine import Engine
from lowvram.offload.events import Moment

Tensor = torch.Tensor
Moments = tuple[Moment, ...]
# Copies one thing into a slot, not before the moments given; returns the moments when it is there. Where nothing has
# to be copied those are the moments given: whoever takes the slot writes to it.
Fill = Callable[[Tensor, Moments], Moments]
_Free = deque[tuple[int, Moments]]
_Coming = deque[tuple[Hashable, int, Moments]]


class Prefetcher:
    """``take`` gives the next thing of ``jobs``, which is already on its way; ``release`` frees its slot for another.

    Things have to be taken in the order of ``jobs`` and released in that order too. ``slots`` come from the device's
    allocator, which gives out what computations asked for before may still read.
    """

    def __init__(self, engine: Engine, slots: list[Tensor]):
        self._engine, self._slots = engine, slots
        self._free: _Free = deque((i, (engine.now(),)) for i in range(len(slots)))
        self._coming: _Coming = deque()
        self._taken: deque[tuple[Hashable, int]] = deque()
        self._jobs: Iterator[tuple[Hashable, Fill]] = iter(())
        # The slots go back to where computations get their memory from.
        weakref.finalize(self, _wait_for_copies, engine, self._free, self._coming).atexit = False

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
        for moment in there:
            self._engine.wait(moment)
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


def _wait_for_copies(engine: Engine, free: _Free, coming: _Coming) -> None:
    """Let what is computed from here on wait for all copies from and to slots."""
    for moments in (*(moments for _, moments in free), *(moments for _, _, moments in coming)):
        for moment in moments:
            engine.wait(moment)
