"""Accesses that nothing orders, found by vector clocks (Mattern 1988; happens-before of Lamport 1978).

Each stream, and the host, counts what it was asked. An event carries what its stream had seen when it was recorded; who
waits for it has seen that too. Two accesses to the same bytes, one of them a write, race unless the later one's stream
has seen the earlier one. Allocation counts as a write of the computation, because the caching allocator hands memory
out in the computation's order; freed memory goes back to that order, so whatever touched it has to be seen by then.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import weakref
from pathlib import Path
from typing import Any

import torch

from tests.lowvram.streams.fake_cuda import COMPUTE, HOST, INWARDS, OUTWARDS, Registered, tensors, written

Tensor = torch.Tensor
Clock = dict[str, int]
ROOT = Path(__file__).parents[3]
Where = tuple[str, int] | None
"""A line of the product: its file and number."""
PRODUCT = tuple(str(ROOT / folder) for folder in ("lowvram", "kernels", "models", "tests/lowvram/streams/miniature"))


@dataclasses.dataclass(frozen=True, slots=True)
class Access:
    """Bytes [low, high) of a storage, touched as number ``tick`` of what ``stream`` was asked, at ``where``."""

    low: int
    high: int
    stream: str
    tick: int
    writes: bool
    what: str
    where: Where

    def __str__(self) -> str:
        return f"{self.stream} {'writes' if self.writes else 'reads'} ({self.what} at {_words(self.where)})"


@dataclasses.dataclass
class Memory:
    """A storage while it lives: accesses that later ones may still race with."""

    address: int
    nbytes: int
    watch: weakref.ref[Any]
    accesses: list[Access] = dataclasses.field(default_factory=list)


class Clocks:
    """A ``fake_cuda.Model`` that runs everything at once; ``races`` says what misses which wait, each place once."""

    def __init__(self) -> None:
        self._clocks: dict[str, Clock] = {name: {name: 1} for name in (COMPUTE, INWARDS, OUTWARDS, HOST)}
        self._memory: dict[int, Memory] = {}
        self._gone: list[Memory] = []
        self._pinned = Registered()
        self.races: dict[str, int] = {}
        self.copies = 0

    def computed(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if func.is_view:
            return
        self._issue(COMPUTE)
        changed = [id(tensor) for tensor in written(func, args, kwargs)]
        what, where = func._schema.name, _line()
        for tensor in tensors((args, kwargs)):
            self._touch(tensor, COMPUTE, id(tensor) in changed, what, where)
        for tensor in tensors(out):
            if tensor.untyped_storage()._cdata not in self._memory:
                made = self._access(tensor, COMPUTE, True, f"allocation in {what}", where)
                self._known(tensor).accesses.append(made)

    def copy(self, stream: str, dst: Tensor, src: Tensor) -> None:
        self._issue(stream)
        self.copies += 1
        where = _line()
        self._touch(src, stream, False, "copy", where, pageable=stream == INWARDS)
        self._touch(dst, stream, True, "copy", where, pageable=stream == OUTWARDS)
        dst.copy_(src)

    def recorded(self, stream: str) -> Clock:
        return dict(self._clocks[stream])

    def waits(self, stream: str, point: Clock | None) -> None:
        _join(self._clocks[stream], point or {})

    def synchronized(self) -> None:
        for clock in self._clocks.values():
            _join(self._clocks[HOST], clock)

    def registered(self, address: int, nbytes: int) -> None:
        self._pinned.add(address, nbytes)
        for memory in self._memory.values():
            if address <= memory.address < address + nbytes:
                memory.accesses.clear()  # it was the host's alone

    def unregistered(self, address: int) -> None:
        for memory in [*self._memory.values(), *self._gone]:
            if memory.address == address:
                self._end(memory, HOST, "unregisters")
        self._gone = [memory for memory in self._gone if memory.address != address]
        self._pinned.drop(address)

    def _issue(self, stream: str) -> None:
        """Everything is asked by the host, and so comes after what the host has waited for."""
        clock = self._clocks[stream]
        _join(clock, self._clocks[HOST])
        clock[stream] += 1

    def _touch(
        self, tensor: Tensor, stream: str, writes: bool, what: str, where: Where, pageable: bool = False
    ) -> None:
        if not tensor.numel():
            return
        if self._pinned.holds(tensor.untyped_storage().data_ptr()):
            if stream == COMPUTE:  # no kernel reads host memory: this is the host's own work
                stream = HOST
                self._clocks[HOST][HOST] += 1
        elif pageable:
            return  # the driver takes such a copy's bytes, or waits for them, before the call returns
        memory, access = self._known(tensor), self._access(tensor, stream, writes, what, where)
        clock, kept = self._clocks[stream], []
        for other in memory.accesses:
            seen = clock.get(other.stream, 0) >= other.tick
            if not seen and (writes or other.writes) and other.low < access.high and access.low < other.high:
                self._report(str(other), str(access), f"{stream} has not waited for {other.stream}")
            covered = access.low <= other.low and other.high <= access.high and (writes or not other.writes)
            if not (seen and covered):
                kept.append(other)
        memory.accesses = [*kept, access]

    def _access(self, tensor: Tensor, stream: str, writes: bool, what: str, where: Where) -> Access:
        size = tensor.element_size()
        low = tensor.storage_offset() * size
        if tensor.is_contiguous():
            high = low + tensor.numel() * size
        else:
            last = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
            high = low + (last + 1) * size
        return Access(low, high, stream, self._clocks[stream][stream], writes, what, where)

    def _known(self, tensor: Tensor) -> Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._memory:
            watch = weakref.ref(storage, functools.partial(self._freed, key))
            self._memory[key] = Memory(storage.data_ptr(), storage.nbytes(), watch)
        return self._memory[key]

    def _freed(self, key: int, _: object) -> None:
        memory = self._memory.pop(key)
        if self._pinned.holds(memory.address):
            self._gone.append(memory)  # unregistering it, which comes next, tells
        else:
            self._end(memory, COMPUTE, "gets the freed memory back")

    def _end(self, memory: Memory, stream: str, what: str) -> None:
        clock = self._clocks[stream] | {HOST: self._clocks[HOST][HOST]}
        for other in memory.accesses:
            if max(clock.get(other.stream, 0), self._clocks[HOST].get(other.stream, 0)) < other.tick:
                self._report(str(other), f"{stream} {what} at {_words(_line())}", f"nothing waited for {other.stream}")
        memory.accesses.clear()

    def _report(self, before: str, after: str, lacking: str) -> None:
        race = f"{before}, then {after}: {lacking}"
        self.races[race] = self.races.get(race, 0) + 1


def _join(clock: Clock, other: Clock) -> None:
    for stream, tick in other.items():
        if tick > clock.get(stream, 0):
            clock[stream] = tick


def _line() -> Where:
    """The innermost line of the product that led here."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if _of_product(name):
            return name, frame.f_lineno
        frame = frame.f_back
    return None


@functools.cache
def _of_product(name: str) -> bool:
    return name.startswith(PRODUCT) and not name.endswith("lowvram/offload/copy_engine.py")


def _words(where: Where) -> str:
    return f"{where[0][len(str(ROOT)) + 1 :]}:{where[1]}" if where else "?"
