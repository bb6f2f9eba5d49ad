"""The caching allocator with ``expandable_segments``, as ``AllocatorModel`` models it without.

A pool is one endless range of addresses. Memory is mapped into it page by page (2 MiB in the small pool, 20 MiB in the
large one) where a block needs it, behind what is free there already; when the device is full, every page that is
wholly free is unmapped, wherever it lies. So a hole between two blocks costs less than two pages, not its size.
"""

from __future__ import annotations

from lowvram.simulate.allocator import (
    LARGE_SEGMENT_BYTES,
    SMALL_SEGMENT_BYTES,
    AllocatorModel,
    DeviceFull,
    MemoryBlock,
    merge,
)

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
            missing = -(-(nbytes - before) // page_bytes(small)) * page_bytes(small)
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
        begin, end = -(-block.address // page) * page, (block.address + block.nbytes) // page * page
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
