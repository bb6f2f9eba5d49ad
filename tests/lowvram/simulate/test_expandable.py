import itertools
import random

import pytest

from lowvram.simulate.allocator import DeviceFull
from lowvram.simulate.expandable import ExpandableAllocatorModel

MIB = 1 << 20
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
