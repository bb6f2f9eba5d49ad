"""The allocator's model against sequences worked out by hand from torch's documented policy."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest
import torch

from lowvram.simulate import allocator
from lowvram.simulate.allocator import AllocatorModel, DeviceFull, ExpandableAllocatorModel, segment_bytes

KIB, MIB = 1 << 10, 1 << 20


def figures(memory: AllocatorModel) -> tuple[int, int]:
    return memory.allocated, memory.reserved


def test_the_constants_are_those_of_the_installed_torch():
    header = Path(torch.__file__).parent / "include/c10/core/AllocatorConfig.h"
    if not header.is_file():
        pytest.skip(f"{header} does not come with this torch")
    stated = {name: int(value) for name, value in re.findall(r"size_t (k\w+) = (\d+);", header.read_text())}
    assert stated["kMinBlockSize"] == allocator.MIN_BLOCK_BYTES
    assert stated["kSmallSize"] == allocator.SMALL_BYTES
    assert stated["kSmallBuffer"] == allocator.SMALL_SEGMENT_BYTES
    assert stated["kMinLargeAlloc"] == allocator.OWN_SEGMENT_BYTES
    assert stated["kRoundLarge"] == allocator.SEGMENT_STEP_BYTES
    assert re.search(r"large_segment_size_\{(\d+)\}", header.read_text())[1] == str(allocator.LARGE_SEGMENT_BYTES)


@pytest.mark.parametrize(
    ("rounded", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (509 * MIB, 510 * MIB),
    ],
)
def test_segments_come_in_these_sizes(rounded, segment):
    assert segment_bytes(rounded) == segment


def test_small_blocks_share_a_segment_and_are_rounded_to_512_bytes():
    memory = AllocatorModel()
    memory.allocate(1)
    assert figures(memory) == (512, 2 * MIB)
    memory.allocate(513)
    assert figures(memory) == (1536, 2 * MIB)
    memory.allocate(MIB)
    assert figures(memory) == (MIB + 1536, 2 * MIB)
    memory.allocate(MIB)  # no MiB is left in the first segment
    assert figures(memory) == (2 * MIB + 1536, 4 * MIB)


def test_nothing_takes_nothing():
    memory = AllocatorModel()
    assert memory.allocate(0) is None
    memory.release(None)
    assert figures(memory) == (0, 0)


def test_middle_sizes_are_cut_from_20_mib():
    memory = AllocatorModel()
    for count in (1, 2, 3):
        memory.allocate(6 * MIB)
        assert figures(memory) == (count * 6 * MIB, 20 * MIB)
    memory.allocate(2 * MIB)  # exactly what is left
    assert figures(memory) == (20 * MIB, 20 * MIB)


def test_a_rest_of_up_to_a_mib_is_not_split_off_and_counts_as_allocated():
    memory = AllocatorModel()
    memory.allocate(11 * MIB)  # of a segment of 12 MiB
    assert figures(memory) == (12 * MIB, 12 * MIB)
    memory = AllocatorModel()
    memory.allocate(11 * MIB - 512)
    assert figures(memory) == (11 * MIB - 512, 12 * MIB)


def test_small_and_large_blocks_do_not_share():
    memory = AllocatorModel()
    memory.release(memory.allocate(8 * MIB))
    memory.allocate(4 * KIB)
    assert figures(memory) == (4 * KIB, 22 * MIB)


def test_the_smallest_free_block_that_is_large_enough_is_taken():
    memory = AllocatorModel()
    blocks = [memory.allocate(nbytes * MIB) for nbytes in (30, 14, 40)]
    for block in blocks:
        memory.release(block)
    assert memory.allocate(12 * MIB) is blocks[1]
    assert memory.allocate(16 * MIB) is blocks[0]  # and 14 MiB of it stay free
    assert memory.allocate(14 * MIB).address == blocks[0].address + 16 * MIB
    assert figures(memory) == (42 * MIB, 84 * MIB)


def test_of_equal_blocks_the_lowest_is_taken():
    memory = AllocatorModel()
    first, second = memory.allocate(12 * MIB), memory.allocate(12 * MIB)
    memory.release(second)
    memory.release(first)
    assert memory.allocate(12 * MIB) is first


def test_freed_neighbours_merge_whatever_the_order():
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        memory = AllocatorModel()
        blocks = [memory.allocate(6 * MIB) for _ in range(3)]
        for index in order:
            memory.release(blocks[index])
        assert memory.allocate(20 * MIB).nbytes == 20 * MIB
        assert figures(memory) == (20 * MIB, 20 * MIB)


def test_freed_memory_stays_reserved_until_the_cache_is_emptied():
    memory = AllocatorModel()
    whole, cut = memory.allocate(50 * MIB), memory.allocate(6 * MIB)
    memory.release(whole)
    assert figures(memory) == (6 * MIB, 70 * MIB)
    memory.empty_cache()  # the 20 MiB segment has a block in use
    assert figures(memory) == (6 * MIB, 20 * MIB)
    memory.release(cut)
    memory.empty_cache()
    assert figures(memory) == (0, 0)


def test_a_full_device_gives_up_its_cache_before_it_fails():
    memory = AllocatorModel(capacity=100 * MIB)
    cached, kept = memory.allocate(60 * MIB), memory.allocate(6 * MIB)
    memory.release(cached)
    memory.allocate(70 * MIB)
    assert figures(memory) == (76 * MIB, 90 * MIB)
    with pytest.raises(DeviceFull, match=f"{16 * MIB} bytes needed beside {90 * MIB} reserved of {100 * MIB}"):
        memory.allocate(15 * MIB)
    memory.allocate(14 * MIB)  # what is left of the segment that is cut
    memory.allocate(10 * MIB)
    assert figures(memory) == (100 * MIB, 100 * MIB)
    memory.release(kept)
    with pytest.raises(DeviceFull):
        memory.allocate(7 * MIB)


def test_peaks_are_the_highest_since_the_last_reset():
    memory = AllocatorModel()
    block = memory.allocate(30 * MIB)
    memory.release(block)
    assert (memory.peak_allocated, memory.peak_reserved) == (30 * MIB, 30 * MIB)
    memory.reset_peaks()
    assert (memory.peak_allocated, memory.peak_reserved) == (0, 30 * MIB)
    memory.allocate(10 * MIB)
    assert (memory.peak_allocated, memory.peak_reserved) == (10 * MIB, 30 * MIB)


def test_blocks_never_overlap_and_everything_comes_back():
    draw = random.Random(0)
    memory, held = AllocatorModel(), []
    for _ in range(3000):
        if held and draw.random() < 0.5:
            memory.release(held.pop(draw.randrange(len(held))))
        else:
            nbytes = int(2 ** draw.uniform(0, 26))
            block = memory.allocate(nbytes)
            assert block.nbytes >= nbytes
            held.append(block)
        assert memory.allocated == sum(block.nbytes for block in held) <= memory.reserved
    spans = sorted((block.address, block.address + block.nbytes) for block in held)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for block in held:
        memory.release(block)
    memory.empty_cache()
    assert figures(memory) == (0, 0)


PAGE = 20 * MIB


def test_memory_comes_in_pages_behind_what_is_there():
    model = ExpandableAllocatorModel()
    a = model.allocate(30 * MIB)
    assert (model.allocated, model.reserved) == (30 * MIB, 2 * PAGE)
    model.allocate(10 * MIB)
    assert (model.allocated, model.reserved) == (40 * MIB, 2 * PAGE)
    model.release(a)
    model.allocate(25 * MIB)  # where a was
    assert model.reserved == 2 * PAGE


def test_a_block_grows_out_of_what_is_free_at_the_end():
    model = ExpandableAllocatorModel()
    model.release(model.allocate(30 * MIB))
    model.allocate(50 * MIB)
    assert model.reserved == 3 * PAGE


def test_holes_are_unmapped_where_the_device_is_full():
    """Two blocks of 100 MiB with one between them that goes: a larger one takes its memory at another address."""
    model = ExpandableAllocatorModel(300 * MIB)
    first, between, last = (model.allocate(100 * MIB) for _ in range(3))
    model.release(between)
    model.release(first)
    assert model.reserved == 300 * MIB
    keep = model.allocate(190 * MIB)
    assert (model.allocated, model.reserved) == (290 * MIB, 300 * MIB)
    model.release(last)
    model.release(keep)
    model.allocate(300 * MIB)
    assert model.reserved == 300 * MIB


def test_a_hole_costs_less_than_two_pages():
    model = ExpandableAllocatorModel(200 * MIB)
    blocks = [model.allocate(50 * MIB) for _ in range(4)]
    model.release(blocks[1])
    model.release(blocks[3])
    # 100 MiB are free, of which [50, 60) and the page's other half lie beside blocks that stay.
    with pytest.raises(DeviceFull):
        model.allocate(100 * MIB)
    model.allocate(80 * MIB)


def test_small_blocks_have_pages_of_their_own():
    model = ExpandableAllocatorModel()
    model.allocate(1000)
    model.allocate(3 * MIB)
    assert model.allocated == 1024 + 3 * MIB
    assert model.reserved == 2 * MIB + PAGE


def test_any_order_of_calls_keeps_the_books():
    draw, model, live = random.Random(0), ExpandableAllocatorModel(600 * MIB), {}
    for number in range(4000):
        if live and draw.random() < 0.5:
            model.release(live.pop(draw.choice(list(live))))
        else:
            try:
                live[number] = model.allocate(draw.choice([700, 40_000, 3 * MIB, 17 * MIB, 55 * MIB]))
            except DeviceFull:
                assert model.allocated > 300 * MIB
        spans = sorted((block.address, block.address + block.nbytes) for block in live.values() if not block.small)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
        assert model.allocated == sum(block.nbytes for block in live.values()) <= model.reserved <= 600 * MIB
    for block in live.values():
        model.release(block)
    model.empty_cache()
    assert (model.allocated, model.reserved) == (0, 0)
