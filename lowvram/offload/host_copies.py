"""Where streamed layers lie on the host: in memory of this process, or in one copy for all ranks of a machine."""

from __future__ import annotations

from typing import Protocol

import torch

from lowvram.offload.copy_engine import Engine

Tensor = torch.Tensor


class Shared(Protocol):
    def slab(self, index: int, content: Tensor) -> Tensor:
        """The machine's copy of ``content``, the bytes of layer ``index``; made first where nobody has done so yet."""
        ...


class HostCopies:
    """Ready to be copied from; ``shared`` None: in this process alone."""

    def __init__(self, engine: Engine, shared: Shared | None = None):
        self._engine, self._shared = engine, shared
        self._pinned: set[int] = set()

    def keep(self, index: int, mapped: Tensor) -> Tensor:
        """A layer's bytes, of a mapped file, ready to be copied from again and again."""
        if self._shared is None:
            return self._engine.keep_on_host(mapped)
        slab = self._shared.slab(index, mapped)
        if index not in self._pinned:
            self._engine.pin(slab)
            self._pinned.add(index)
        return slab
