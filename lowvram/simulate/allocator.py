"""A model of PyTorch's caching allocator on a GPU: what a sequence of allocations and frees comes to, in bytes.

It is the policy of ``c10/cuda/CUDACachingAllocator.cpp`` with its default settings (without expandable segments, no
limit on splitting, one stream): sizes are rounded up to 512 bytes; up to 1 MiB comes out of 2 MiB segments, larger
ones below 10 MiB out of 20 MiB segments, anything else out of a segment of its own, rounded up to 2 MiB; the smallest
free block that is large enough is taken and split; freed neighbours merge; segments go back to the driver only where
the device is full. Blocks freed on another stream, which wait for an event before they can be used again, are not
modelled.

With ``expandable_segments`` a pool is one endless range of addresses. Memory is mapped into it page by page (2 MiB in
the small pool, 20 MiB in the large one) where a block needs it, behind what is free there already; when the device is
full, every page that is wholly free is unmapped, wherever it lies. So a hole between two blocks costs less than two
pages, not its size.
"""

from __future__ import annotations

import bisect
import dataclasses

from lowvram_kernels.rounding import round_up

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
        rounded = round_up(nbytes, MIN_BLOCK_BYTES)
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
        # No two blocks have one address, so that they are not compared themselves.
        bisect.insort(self._free[block.small], (block.nbytes, block.address, block))

    def _drop(self, block: MemoryBlock) -> None:
        pool = self._free[block.small]
        del pool[bisect.bisect_left(pool, (block.nbytes, block.address))]


def segment_bytes(rounded: int) -> int:
    """Size of the segment that is asked of the driver for a block of ``rounded`` bytes."""
    if rounded <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    return LARGE_SEGMENT_BYTES if rounded < OWN_SEGMENT_BYTES else round_up(rounded, SEGMENT_STEP_BYTES)


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


_ENDLESS = 1 << 62


class ExpandableAllocatorModel(AllocatorModel):
    """Source: ``c10/cuda/CUDACachingAllocator.cpp``, ``ExpandableSegment`` and ``try_allocate_expandable_block``."""

    def __init__(self, capacity: int | None = None):
        super().__init__(capacity)
        # Addresses without memory, in order; blocks that are neither free nor allocated.
        self._unmapped = {small: [MemoryBlock(0, _ENDLESS, small, free=False)] for small in (True, False)}

    def empty_cache(self) -> None:
        for small, pool in self._free.items():
            for _, _, block in list(pool):
                self._unmap(block, page_bytes(small))

    def _new_segment(self, nbytes: int, small: bool) -> MemoryBlock:
        # ``nbytes`` is what a segment of its own would take; here only the block itself counts.
        return self._mapped(nbytes, small)

    def _segment_bytes(self, rounded: int) -> int:
        return rounded

    def _mapped(self, nbytes: int, small: bool, *, last_try: bool = False) -> MemoryBlock:
        hole, missing = self._place(nbytes, small)
        if self.capacity is not None and self.reserved + missing > self.capacity:
            if last_try:
                raise DeviceFull(missing, self.reserved, self.capacity)
            self.empty_cache()
            return self._mapped(nbytes, small, last_try=True)
        self.reserved += missing
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        block = MemoryBlock(hole.address, missing, small, before=hole.before, after=hole)
        if hole.before is not None:
            hole.before.after = block
        hole.address, hole.nbytes, hole.before = hole.address + missing, hole.nbytes - missing, block
        if not hole.nbytes:
            self._remove_hole(hole)
        if block.before is not None and block.before.free:
            self._drop(block.before)
            merge(block, block.before)
        return block

    def _place(self, nbytes: int, small: bool) -> tuple[MemoryBlock, int]:
        """The first hole that a block fits in, with what is free before it, and the bytes to map there."""
        for hole in self._unmapped[small]:
            before = hole.before.nbytes if hole.before is not None and hole.before.free else 0
            missing = round_up(nbytes - before, page_bytes(small))
            if missing <= hole.nbytes:
                return hole, missing
        raise AssertionError("the last hole has no end")

    def _remove_hole(self, hole: MemoryBlock) -> None:
        self._unmapped[hole.small].remove(hole)
        if hole.before is not None:
            hole.before.after = hole.after
        if hole.after is not None:
            hole.after.before = hole.before

    def _unmap(self, block: MemoryBlock, page: int) -> None:
        """Take the whole pages out of a free block; what is left of it at either end stays free."""
        begin, end = round_up(block.address, page), (block.address + block.nbytes) // page * page
        if begin >= end:
            return
        self._drop(block)
        self.reserved -= end - begin
        hole = MemoryBlock(begin, end - begin, block.small, free=False, before=block.before, after=block.after)
        if begin > block.address:
            hole.before = MemoryBlock(block.address, begin - block.address, block.small, before=block.before)
            _link(block.before, hole.before)
            self._keep(hole.before)
        if end < block.address + block.nbytes:
            rest = block.address + block.nbytes - end
            hole.after = MemoryBlock(end, rest, block.small, after=block.after)
            _link(hole.after, block.after)
            self._keep(hole.after)
        _link(hole.before, hole)
        _link(hole, hole.after)
        self._insert_hole(hole)

    def _insert_hole(self, hole: MemoryBlock) -> None:
        holes = self._unmapped[hole.small]
        for neighbour in (hole.before, hole.after):
            if neighbour is not None and any(neighbour is other for other in holes):
                holes.remove(neighbour)
                merge(hole, neighbour)
        holes.append(hole)
        holes.sort(key=lambda block: block.address)


def page_bytes(small: bool) -> int:
    return SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES


def _link(before: MemoryBlock | None, after: MemoryBlock | None) -> None:
    if before is not None:
        before.after = after
    if after is not None:
        after.before = before
