"""Copies from and to host memory that is not pinned, beside the computation all the same: through a little that is.

For each direction a thread moves bytes between pageable memory and a few pinned buffers, and asks the device for the
copies between those and its own memory. The host waits for a thread only until it has asked; the device never does.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Protocol

import torch

from lowvram.offload.events import Mark, Moment

Tensor = torch.Tensor
Job = Callable[[], None]
Context = Callable[[], contextlib.AbstractContextManager[object]]
# What a failure of a copy of so many bytes, "to" or "from" the device, becomes.
Failing = Callable[[str, int], contextlib.AbstractContextManager[object]]

PIECE_BYTES, PIECES = 16 << 20, 4


class Way(Protocol):
    """A stream that copies in one direction."""

    def wait(self, moment: Moment) -> None:
        """Let what is copied from here on wait for ``moment``; the host does not wait."""
        ...

    def copy(self, dst: Tensor, src: Tensor) -> None:
        """Ask for a copy. The host waits for its end, too, where its memory is not pinned."""
        ...

    def mark(self) -> Mark:
        """The moment when everything asked so far is copied."""
        ...


class StagedMoment(Moment):
    """When a copy is done that a thread is to ask the device for. ``host`` is the host's side of it."""

    def __init__(self, host: Tensor):
        self._begin, self._end = host.data_ptr(), host.data_ptr() + host.nbytes
        self.asked: Future[Moment] = Future()
        """The moment on the device, once it is known."""
        self.landed: Future[None] = Future()
        """Done when the host is done with its side: bytes are read where they were, or have come where they go."""

    def touches(self, other: StagedMoment) -> bool:
        """Whether both have host memory in common."""
        return self._begin < other._end and other._begin < self._end


class Staging:
    """Takes all copies of an engine from when host memory could not be pinned any more: those that a device can do by
    itself, too, since their order has to be held with the others'.

    Args:
        inwards, outwards: the streams.
        ring: pinned memory, of which each direction has half.
        pinned: whether the device can copy from and to a part of host memory by itself.
        failing: see ``Failing``.
        context: entered by the threads around each copy.
    """

    def __init__(
        self,
        inwards: Way,
        outwards: Way,
        ring: Tensor,
        pinned: Callable[[Tensor], bool],
        failing: Failing,
        context: Context,
    ):
        half = ring.numel() // 2
        self._in = _Porter("lowvram-copies-in", _Inwards(inwards, ring[:half], pinned), failing, context)
        self._out = _Porter("lowvram-copies-out", _Outwards(outwards, ring[half:], pinned), failing, context)
        self._under_way: list[StagedMoment] = []

    def copy_in(self, dst: Tensor, src: Tensor, after: tuple[Moment, ...]) -> Moment:
        return self._take(self._in, dst, src, after, StagedMoment(src))

    def copy_out(self, dst: Tensor, src: Tensor, after: tuple[Moment, ...]) -> Moment:
        return self._take(self._out, dst, src, after, StagedMoment(dst))

    def asked(self, moment: StagedMoment) -> Moment:
        """The moment on the device, once a thread has asked for the copy.

        Raises:
            DeviceError: the copy failed.
        """
        try:
            return moment.asked.result()
        except BaseException as error:
            for porter in (self._in, self._out):
                porter.told(error)
            raise

    def _take(
        self, porter: _Porter, dst: Tensor, src: Tensor, after: tuple[Moment, ...], moment: StagedMoment
    ) -> StagedMoment:
        # What is to come after a copy may say so by something that the device waits for, and the thread would not.
        self._under_way = [other for other in self._under_way if not other.landed.done()]
        same_memory = [other for other in self._under_way if other.touches(moment)]
        self._under_way.append(moment)
        porter.take(dst, src, after, same_memory, moment)
        return moment

    def settle(self) -> None:
        """Wait until everything is asked for, and has landed where it comes out.

        Raises:
            DeviceError: a copy failed that nobody has waited for.
        """
        for porter in (self._out, self._in):
            porter.settle()

    def in_a_thread_of_its_own(self) -> bool:
        return threading.current_thread() in (self._in.thread, self._out.thread)


class _Carrier(Protocol):
    """How things are copied one way. ``word`` says which, as in "to the device"."""

    word: str

    def carry(self, dst: Tensor, src: Tensor, after: list[Moment], moment: StagedMoment) -> None: ...


class _Porter:
    """A thread that carries one thing after the other, and what has gone wrong in it."""

    def __init__(self, name: str, carrier: _Carrier, failing: Failing, context: Context):
        self._carrier, self._failing, self._context = carrier, failing, context
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._faults: deque[BaseException] = deque()
        self.thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        self.thread.start()
        weakref.finalize(self, self._jobs.put, None)

    def take(
        self,
        dst: Tensor,
        src: Tensor,
        after: tuple[Moment, ...],
        same_memory: list[StagedMoment],
        moment: StagedMoment,
    ) -> None:
        self._raise()
        carrier, failing, context, faults = self._carrier, self._failing, self._context, self._faults

        def job() -> None:
            try:
                # Inference mode is a thread's own: tensors that were made in it may not be written to outside of it.
                with failing(carrier.word, src.nbytes), context(), torch.inference_mode():
                    for before in same_memory:
                        before.landed.result()
                    known = [m.asked.result() if isinstance(m, StagedMoment) else m for m in after]
                    carrier.carry(dst, src, known, moment)
            except BaseException as error:
                faults.append(error)
                for future in (moment.asked, moment.landed):
                    if not future.done():
                        future.set_exception(error)

        self._jobs.put(job)

    def told(self, error: BaseException) -> None:
        """Whoever waited for the copy that failed knows."""
        if error in self._faults:
            self._faults.clear()  # those behind it follow from it

    def settle(self) -> None:
        done = threading.Event()
        self._jobs.put(done.set)
        done.wait()
        self._raise()

    def _raise(self) -> None:
        if self._faults:
            error = self._faults[0]
            self.told(error)
            raise error


def _work(jobs: queue.SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # it holds what it copied


class _Ring:
    """Pieces of pinned memory that take turns; each is waited for before it is used again."""

    def __init__(self, memory: Tensor):
        size = min(PIECE_BYTES, memory.numel() // PIECES)
        self._pieces = [memory[i * size : (i + 1) * size] for i in range(memory.numel() // size)]
        self._marks: list[Mark | None] = [None] * len(self._pieces)
        self._turns = itertools.cycle(range(len(self._pieces)))
        self.size, self.count = size, len(self._pieces)

    def take(self) -> tuple[int, Tensor]:
        turn = next(self._turns)
        mark, self._marks[turn] = self._marks[turn], None
        if mark is not None:
            mark.pass_on_host()
        return turn, self._pieces[turn]

    def used(self, turn: int, mark: Mark) -> None:
        """The piece may be used again once ``mark`` has passed."""
        self._marks[turn] = mark

    def parts(self, dst: Tensor, src: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, dst.numel(), self.size):
            yield dst[first : first + self.size], src[first : first + self.size]


class _Inwards:
    word = "to"

    def __init__(self, way: Way, memory: Tensor, pinned: Callable[[Tensor], bool]):
        self._way, self._ring, self._pinned = way, _Ring(memory), pinned

    def carry(self, dst: Tensor, src: Tensor, after: list[Moment], moment: StagedMoment) -> None:
        pieces = None if self._pinned(src) else _flat(dst, src)
        if pieces is None:
            _all_at_once(self._way, dst, src, after)
        else:
            for number, (there, here) in enumerate(self._ring.parts(*pieces)):
                turn, piece = self._ring.take()
                piece = piece[: here.numel()]
                piece.copy_(here)
                if number == 0:  # only now: pinned memory is filled while the device is not ready for it yet
                    _wait(self._way, after)
                self._way.copy(there, piece)
                self._ring.used(turn, self._way.mark())
        moment.asked.set_result(self._way.mark())
        moment.landed.set_result(None)


class _Outwards:
    word = "from"

    def __init__(self, way: Way, memory: Tensor, pinned: Callable[[Tensor], bool]):
        self._way, self._ring, self._pinned = way, _Ring(memory), pinned

    def carry(self, dst: Tensor, src: Tensor, after: list[Moment], moment: StagedMoment) -> None:
        pieces = None if self._pinned(dst) else _flat(dst, src)
        if pieces is None:
            _all_at_once(self._way, dst, src, after)
            moment.asked.set_result(self._way.mark())
            moment.landed.set_result(None)  # a copy in of the same memory waits for it on the device
            return
        _wait(self._way, after)
        coming: deque[tuple[Tensor, Tensor, Mark]] = deque()
        for here, there in self._ring.parts(*pieces):
            if len(coming) == self._ring.count:
                _land(*coming.popleft())
            _, piece = self._ring.take()
            piece = piece[: there.numel()]
            self._way.copy(piece, there)
            coming.append((here, piece, self._way.mark()))
        moment.asked.set_result(self._way.mark())
        while coming:
            _land(*coming.popleft())
        moment.landed.set_result(None)


def _land(dst: Tensor, piece: Tensor, there: Mark) -> None:
    there.pass_on_host()
    dst.copy_(piece)


def _all_at_once(way: Way, dst: Tensor, src: Tensor, after: list[Moment]) -> None:
    _wait(way, after)
    way.copy(dst, src)


def _wait(way: Way, after: list[Moment]) -> None:
    for moment in after:
        way.wait(moment)


def _flat(dst: Tensor, src: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both as bytes in a row; None where they are none, so that the device has to copy them in its own way."""
    if dst.dtype != src.dtype or dst.shape != src.shape or not (dst.is_contiguous() and src.is_contiguous()):
        return None
    return dst.view(-1).view(torch.uint8), src.view(-1).view(torch.uint8)
