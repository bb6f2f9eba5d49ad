import weakref

import pytest
import torch

from lowvram.denoise.kv_cache import Rings, RingShape, Sink, Window
from lowvram.denoise.kv_format import PlainFormat, kv_format
from lowvram.offload.copy_engine import Engine

HEADS, WIDTH, STEPS, LAYERS = 2, 4, 2, 3
SHAPE = RingShape.of(5, 2, 3)
CELLS = [(step, layer) for step in range(STEPS) for layer in range(LAYERS)]


def make_rings(on_host=(), staging=2) -> tuple[Rings, Engine]:
    engine = Engine(torch.device("cpu"))
    rings = Rings(SHAPE, PlainFormat(HEADS, WIDTH, torch.float32), engine, range(STEPS), LAYERS)
    rings.place(on_host, staging)
    return rings, engine


def write(rings: Rings, clip: int, slot: int, value: float) -> torch.Tensor:
    """One pass over all cells; returns the keys that the last cell saw."""
    window = SHAPE.window(clip, slot)
    new = torch.full((SHAPE.slots[slot], HEADS, WIDTH), value)
    rings.expect((cell, window) for cell in CELLS)
    for cell in CELLS:
        slots = rings.open(cell)
        rings.kind.write(slots[slot][0], new, -new)
        seen = torch.cat([rings.kind.read(*s, torch.float32)[0] for s in slots[: window.visible]])
        rings.close(cell, window, slots)
    return seen[:, 0, 0]


def test_a_ring_has_a_slot_for_each_block_of_a_clip():
    assert SHAPE.slots == (6, 6, 3)
    assert SHAPE.capacity == 15


def test_a_block_sees_what_was_written_and_then_the_whole_ring():
    assert [SHAPE.window(0, slot) for slot in range(3)] == [Window(0, 1), Window(1, 2), Window(2, 3)]
    assert [SHAPE.window(clip, 1) for clip in (1, 7)] == [Window(1, 3)] * 2


@pytest.mark.parametrize("on_host", [[], CELLS, CELLS[1::2]], ids=["device", "host", "mixed"])
def test_blocks_lie_behind_each_other_and_are_replaced(on_host):
    rings, _ = make_rings(on_host)
    assert write(rings, 0, 0, 1).tolist() == [1] * 6
    assert write(rings, 0, 1, 2).tolist() == [1] * 6 + [2] * 6
    assert write(rings, 0, 2, 3).tolist() == [1] * 6 + [2] * 6 + [3] * 3
    assert write(rings, 1, 1, 9).tolist() == [1] * 6 + [9] * 6 + [3] * 3
    keys, values = rings.snapshot(1, 2, torch.float32)
    assert keys[:, 0, 0].tolist() == [1] * 6 + [9] * 6 + [3] * 3
    assert torch.equal(values, -keys)


def test_rings_move_with_what_they_hold():
    def held() -> list[list[float]]:
        return [rings.snapshot(*cell, torch.float32)[0][:, 0, 0].tolist() for cell in CELLS]

    rings, _ = make_rings()
    write(rings, 0, 0, 1)
    write(rings, 0, 1, 2)
    rings.place(CELLS[:4], 1)
    write(rings, 0, 2, 3)
    assert held() == [[1] * 6 + [2] * 6 + [3] * 3] * len(CELLS)
    rings.place(CELLS, 2)
    assert held() == [[1] * 6 + [2] * 6 + [3] * 3] * len(CELLS)
    write(rings, 1, 0, 4)
    assert held() == [[4] * 6 + [2] * 6 + [3] * 3] * len(CELLS)


@pytest.mark.parametrize(
    ("kv", "heads", "width", "tokens"),
    [("plain", 1, 2, 3), ("plain", 3, 2, 5), ("int8", 1, 2, 3), ("int8", 3, 4, 7), ("int8", 5, 6, 1)],
)
def test_every_slot_begins_where_kernels_load_whole_vectors(kv, heads, width, tokens):
    kind = kv_format(kv, heads, width, torch.bfloat16)
    assert kind.nbytes(tokens) % 16
    rings = Rings(RingShape(slots=(tokens, tokens, 1)), kind, Engine(torch.device("cpu")), range(1), 1)
    rings.place((), 0)
    assert [slot.storage_offset() % 16 for slot, _ in rings.open((0, 0))] == [0, 0, 0]
    assert all(slot.nbytes >= kind.nbytes(tokens) for slot, _ in rings.open((0, 0)))


@pytest.mark.parametrize("staging", range(1, 6))
def test_as_many_cells_are_staged_as_were_planned(staging):
    """One more would be memory that no plan knows of."""
    rings, engine = make_rings(CELLS, staging)
    rings.expect((cell, SHAPE.window(1, 0)) for cell in CELLS)
    assert engine.bytes_in == min(staging, len(CELLS)) * rings.cell_nbytes * 2 // 3


def test_only_what_is_seen_comes_in_and_only_what_is_new_goes_out():
    rings, engine = make_rings(CELLS)
    slot_nbytes = rings.cell_nbytes // 3
    moved = []
    for clip, slot in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        before = engine.bytes_in, engine.bytes_out
        write(rings, clip, slot, 1.0)
        moved.append(((engine.bytes_in - before[0]) / slot_nbytes, (engine.bytes_out - before[1]) / slot_nbytes))
    cells = len(CELLS)
    assert moved == [(0, cells), (cells, cells), (2 * cells, cells), (2 * cells, cells), (2 * cells, cells)]


def test_cells_out_of_order_are_refused():
    rings, _ = make_rings(CELLS)
    rings.expect([(CELLS[0], SHAPE.window(0, 0))])
    with pytest.raises(RuntimeError, match="is on its way"):
        rings.open(CELLS[1])


@pytest.mark.parametrize("on_host", [CELLS, CELLS[:1], CELLS[1::2]], ids=["all", "one", "some"])
def test_a_ring_that_moves_to_the_host_is_held_by_nobody(on_host):
    """Not by the slots that it was cut into: they would keep its memory, and stand for what lies there next."""
    rings, _ = make_rings()
    write(rings, 0, 0, 1)
    gone = [weakref.ref(rings._device[cell].untyped_storage()) for cell in on_host]
    assert all(each() is not None for each in gone)
    rings.place(on_host, 2)
    assert all(each() is None for each in gone)


@pytest.mark.parametrize(
    ("kv", "heads", "tokens", "has_room"),
    [("int8", 1, 1, True), ("int8", 2, 5, True), ("int8", 3, 16, True), ("plain", 2, 5, False), ("plain", 1, 1, False)],
)
def test_rotated_keys_of_8_bit_stand_at_one_place(kv, heads, tokens, has_room):
    """Graphs read them where they were captured; keys of their own type are rotated into what attention takes."""
    sink = Sink(kv_format(kv, heads, 4, torch.bfloat16), 2, tokens, torch.device("cpu"))
    sink.write(1, torch.ones(tokens, heads, 4), torch.ones(tokens, heads, 4))
    sink.keep_rotated()
    assert (sink.rotated is not None) == has_room
    if sink.rotated is not None:
        assert sink.rotated.tokens == tokens
        assert sink.rotated.k.untyped_storage().data_ptr() != sink.block(0)[0].untyped_storage().data_ptr()
