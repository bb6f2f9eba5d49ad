"""A model of PyTorch's caching allocator on a GPU: what a sequence of allocations and frees comes to, in bytes.

It is the policy of ``c10/cuda/CUDACachingAllocator.cpp`` with its default settings (no expandable segments, no limit on
splitting, one stream): sizes are rounded up to 512 bytes; up to 1 MiB comes out of 2 MiB segments, larger ones below
10 MiB out of 20 MiB segments, anything else out of a segment of its own, rounded up to 2 MiB; the smallest free block
that is large enough is taken and split; freed neighbours merge; segments go back to the driver only where the device is
full. Blocks freed on another stream, which wait for an event before they can be used again, are not modelled.
"""

from __future__ import annotations

import bisect
import dataclasses

MIN_BLOCK_BYTES = 512
SMALL_BYTES = 1 << 20
SMALL_SEGMENT_BYTES = 2 << 20
LARGE_SEGMENT_BYTES = 20 << 20
OWN_SEGMENT_BYTES = 10 << 20
SEGMENT_STEP_BYTES = 2 << 20


class DeviceFull(Exception):
    """``needed`` bytes for a new segment do not fit beside the ``reserved`` ones."""

    def __init__(self, needed: int, reserved: int, capacity: int):
        super().__init__(f"{needed} bytes needed beside {reserved} reserved of {capacity}")
        self.needed, self.reserved, self.capacity = needed, reserved, capacity


@dataclasses.dataclass(slots=True, eq=False)
class MemoryBlock:
    """A stretch of a segment; ``before`` and ``after`` are its neighbours in it."""

    address: int
    nbytes: int
    small: bool
    free: bool = True
    before: MemoryBlock | None = None
    after: MemoryBlock | None = None

    @property
    def is_whole_segment(self) -> bool:
        return self.before is None and self.after is None


class AllocatorModel:
    """Bytes allocated and reserved, now and at their highest; ``capacity`` limits what is reserved.

    ``allocated`` counts blocks, as ``torch.cuda.memory_allocated`` does: a rounded size, and the rest of a free block
    that was not worth splitting.
    """

    def __init__(self, capacity: int | None = None):
        self.capacity = capacity
        self.allocated = self.peak_allocated = 0
        self.reserved = self.peak_reserved = 0
        self._end = 0
        # Free blocks of the small and of the large pool, by size and then by address.
        self._free: dict[bool, list[tuple[int, int, MemoryBlock]]] = {True: [], False: []}

    def allocate(self, nbytes: int) -> MemoryBlock | None:
        """A block for ``nbytes``; None for none, which takes no memory.

        Raises:
            DeviceFull: no free block fits, and no segment can be had even after all unused ones were given back.
        """
        if nbytes <= 0:
            return None
        rounded = _round_up(nbytes, MIN_BLOCK_BYTES)
        small = rounded <= SMALL_BYTES
        block = self._take(rounded, small) or self._new_segment(self._segment_bytes(rounded), small)
        self._split(block, rounded)
        block.free = False
        self.allocated += block.nbytes
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def release(self, block: MemoryBlock | None) -> None:
        """Give a block back to its pool and merge it with free neighbours."""
        if block is None:
            return
        self.allocated -= block.nbytes
        block.free = True
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                self._drop(neighbour)
                merge(block, neighbour)
        self._keep(block)

    def empty_cache(self) -> None:
        """Give every segment that is wholly free back to the driver."""
        for pool in self._free.values():
            unused = sum(nbytes for nbytes, _, block in pool if block.is_whole_segment)
            self.reserved -= unused
            pool[:] = [entry for entry in pool if not entry[2].is_whole_segment]

    def reset_peaks(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def _segment_bytes(self, rounded: int) -> int:
        return segment_bytes(rounded)

    def _take(self, nbytes: int, small: bool) -> MemoryBlock | None:
        pool = self._free[small]
        index = bisect.bisect_left(pool, (nbytes, -1))
        return pool.pop(index)[2] if index < len(pool) else None

    def _new_segment(self, nbytes: int, small: bool) -> MemoryBlock:
        if self.capacity is not None and self.reserved + nbytes > self.capacity:
            self.empty_cache()
            if self.reserved + nbytes > self.capacity:
                raise DeviceFull(nbytes, self.reserved, self.capacity)
        self.reserved += nbytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        block = MemoryBlock(self._end, nbytes, small)
        self._end += nbytes
        return block

    def _split(self, block: MemoryBlock, nbytes: int) -> None:
        """Cut what is beyond ``nbytes`` off as a free block, where it is worth it in this pool."""
        rest = block.nbytes - nbytes
        if rest < MIN_BLOCK_BYTES if block.small else rest <= SMALL_BYTES:
            return
        tail = MemoryBlock(block.address + nbytes, rest, block.small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = tail
        block.nbytes, block.after = nbytes, tail
        self._keep(tail)

    def _keep(self, block: MemoryBlock) -> None:
        bisect.insort(self._free[block.small], (block.nbytes, block.address, block), key=lambda entry: entry[:2])

    def _drop(self, block: MemoryBlock) -> None:
        pool = self._free[block.small]
        del pool[bisect.bisect_left(pool, (block.nbytes, block.address), key=lambda entry: entry[:2])]


def segment_bytes(rounded: int) -> int:
    """Size of the segment that is asked of the driver for a block of ``rounded`` bytes."""
    if rounded <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    return LARGE_SEGMENT_BYTES if rounded < OWN_SEGMENT_BYTES else _round_up(rounded, SEGMENT_STEP_BYTES)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def merge(block: MemoryBlock, neighbour: MemoryBlock) -> None:
    """Make ``block`` cover ``neighbour``, which lies beside it."""
    if neighbour is block.before:
        block.address, block.before = neighbour.address, neighbour.before
        if block.before is not None:
            block.before.after = block
    else:
        block.after = neighbour.after
        if block.after is not None:
            block.after.before = block
    block.nbytes += neighbour.nbytes
