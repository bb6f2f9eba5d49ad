from __future__ import annotations

import pytest
import torch

from lowvram.offload.copy_engine import DONE, Engine, Moment
from lowvram.offload.prefetch import Prefetcher


class WatchedEngine(Engine):
    """Notes what waits for what."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.waited: list[Moment] = []
        self.moments: list[Moment] = []

    def now(self) -> Moment:
        self.moments.append(Moment())
        return self.moments[-1]

    def wait(self, moment: Moment) -> None:
        self.waited.append(moment)


def jobs(count: int, log: list, there: dict[int, Moment]):
    for number in range(count):

        def fill(slot: torch.Tensor, after: tuple[Moment, ...], number: int = number) -> tuple[Moment, ...]:
            slot.fill_(number)
            log.append((number, after))
            there[number] = Moment()
            return (there[number],)

        yield number, fill


def test_slots_are_filled_ahead_and_wait_for_their_last_reader():
    engine, log, there = WatchedEngine(), [], {}
    prefetcher = Prefetcher(engine, [torch.zeros(1), torch.zeros(1)])
    prefetcher.load(jobs(4, log, there))
    # Nor may the first ones overtake who read the slots' memory before it was given to them.
    assert log == [(0, (engine.moments[0],)), (1, (engine.moments[1],))]
    extra = Moment()
    assert prefetcher.take(0).item() == 0
    assert engine.waited == [there[0]]
    prefetcher.release(0, extra)
    # The third thing comes into the first slot, not before its reader and the copy out of it are done.
    assert log[2] == (2, (engine.moments[2], extra))
    assert [prefetcher.take(n).item() for n in (1, 2)] == [1, 2]
    prefetcher.release(1)
    prefetcher.release(2)
    assert prefetcher.take(3).item() == 3


def test_what_is_taken_out_of_order_is_refused():
    prefetcher = Prefetcher(Engine(torch.device("cpu")), [torch.zeros(1), torch.zeros(1)])
    prefetcher.load(jobs(3, [], {}))
    with pytest.raises(RuntimeError, match="1 was to be taken"):
        prefetcher.take(1)
    prefetcher.take(0)
    prefetcher.take(1)
    with pytest.raises(RuntimeError, match="was taken first"):
        prefetcher.release(1)
    with pytest.raises(RuntimeError, match="2 was to be taken"):
        prefetcher.take(2)


def test_copies_are_counted():
    engine = Engine(torch.device("cpu"))
    assert engine.copy_in(torch.zeros(4), torch.ones(4), DONE) is DONE
    engine.copy_out(torch.zeros(2), torch.ones(2))
    assert (engine.bytes_in, engine.bytes_out) == (16, 8)
