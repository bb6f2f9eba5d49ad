"""One copy of streamed weights in a machine's memory for all its ranks.

It is an anonymous memory file: it has no name that could stay behind, takes memory only where slabs are written, and
goes with the last rank that holds it. Each rank maps, and registers for its card's copies, just the slabs it streams.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence
from itertools import accumulate

import torch

from lowvram_kernels.errors import OutOfMemoryError
from lowvram_kernels.rounding import round_up

Tensor = torch.Tensor

_NAME = "lowvram-weights"


class SharedSlabs:
    """Slabs of so many bytes each, behind a byte for each that says whether it is written."""

    def __init__(self, file: int, sizes: Sequence[int]):
        page = mmap.ALLOCATIONGRANULARITY
        lengths = [round_up(size, page) for size in (len(sizes), *sizes)]
        self._file, self._sizes = file, list(sizes)
        weakref.finalize(self, os.close, file).atexit = False  # mappings do without it
        self._offsets = list(accumulate(lengths, initial=0))
        if os.fstat(file).st_size < self._offsets[-1]:
            os.ftruncate(file, self._offsets[-1])
        self._written = mmap.mmap(file, lengths[0])
        self._maps: dict[int, Tensor] = {}

    @classmethod
    def create(cls, sizes: Sequence[int]) -> SharedSlabs:
        """Raises: OSError where the system has no anonymous files."""
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no anonymous memory files")
        return cls(os.memfd_create(_NAME), sizes)

    @classmethod
    def open(cls, path: str, sizes: Sequence[int]) -> SharedSlabs:
        """What another process of this machine has created, by its ``path`` there."""
        return cls(os.open(path, os.O_RDWR), sizes)

    @property
    def path(self) -> str:
        """Where other processes of the same user find it, for as long as this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def slab(self, index: int, content: Tensor) -> Tensor:
        """The shared copy of ``content``, uint8 of the slab's size; written first where nobody has done so yet.

        Raises:
            OutOfMemoryError: the machine has no memory for it.
        """
        there = self._mapped(index)
        # Two ranks that find nothing write the same bytes, and neither goes on before all of them are there.
        if not self._written[index]:
            there.copy_(content)
            self._written[index] = 1
        return there

    def _mapped(self, index: int) -> Tensor:
        if index not in self._maps:
            size = self._sizes[index]
            try:
                # Taken from the machine now: a page that is not there at its first use would end the process.
                os.posix_fallocate(self._file, self._offsets[index + 1], size)
                pages = mmap.mmap(self._file, size, offset=self._offsets[index + 1])
            except OSError as error:
                raise OutOfMemoryError(
                    f"{size} bytes of host memory for a layer's weights are not there ({error}); close other programs, "
                    "or give the run more --vram-budget or a smaller --size"
                ) from error
            self._maps[index] = torch.frombuffer(pages, dtype=torch.uint8)
        return self._maps[index]
