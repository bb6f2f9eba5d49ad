"""Where only a part of the host memory can be pinned, the rest is copied through a little that is: the same bytes, in
an order that is held, beside the computation."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lowvram import runtime
from lowvram.offload import copy_engine as engine_module
from lowvram.offload.copy_engine import CudaEngine, CudaWay, Engine
from lowvram.offload.events import Moment
from lowvram.offload.placement import MemoryOptions, Placement
from lowvram.offload.staged_copies import StagedMoment
from lowvram.pipeline import AvatarPipeline
from lowvram.recorder import TensorRecorder
from lowvram_kernels.errors import DeviceError
from tests.lowvram.fake_pinning import Cuda, LimitedDriver, cuda_engine, staging_threads
from tests.lowvram.streams.mutations import Mutation

Tensor = torch.Tensor
CPU = torch.device("cpu")
# The pieces of both directions, spare memory, and one buffer.
LIMIT = 8 * 4096 + 4096 + 8192


def values(nbytes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


class Bench:
    """An engine and host memory for it; ``pinned`` memory is such as the driver still pinned."""

    def __init__(self, engine: Engine, cuda: Cuda | None = None):
        self.engine, self.cuda = engine, cuda
        self._pinned = engine.host_buffer(8192)
        self._first = [engine.host_buffer(1 << 20)]  # refused

    def pageable(self, nbytes: int) -> Tensor:
        return self.engine.host_buffer(nbytes).zero_()

    def pinned(self, nbytes: int) -> Tensor:
        return self._pinned[:nbytes].zero_()

    def shut(self, seconds: float) -> None:
        """Threads do not look for what has come out for some time."""
        if self.cuda is not None:
            self.cuda.gate.clear()
            threading.Timer(seconds, self.cuda.gate.set).start()

    def let_it_try(self, moment: Moment, seconds: float = 0.3) -> None:
        """Give a thread time for what it must not do yet; then let what holds it up go on."""
        if self.cuda is not None and isinstance(moment, StagedMoment):
            concurrent.futures.wait([moment.asked], timeout=seconds)
            self.cuda.gate.set()


def staged(monkeypatch: pytest.MonkeyPatch) -> Bench:
    engine, cuda = cuda_engine(monkeypatch, LimitedDriver(LIMIT))
    bench = Bench(engine, cuda)
    assert engine._staging is not None
    assert engine._pins.holds(bench.pinned(10))
    assert not engine._pins.holds(bench.pageable(10))
    return bench


def test_threads_copy_on_their_engines_card(monkeypatch):
    """Which is not the current one of a thread that nobody has told."""
    here, seen = threading.local(), set()

    @contextlib.contextmanager
    def current(device: torch.device) -> Iterator[None]:
        here.device = device
        yield
        here.device = None

    monkeypatch.setattr(engine_module, "current", current)
    bench = staged(monkeypatch)
    copy = CudaWay.copy

    def noted(way: CudaWay, dst: Tensor, src: Tensor) -> None:
        seen.add((threading.current_thread().name, getattr(here, "device", None)))
        copy(way, dst, src)

    monkeypatch.setattr(CudaWay, "copy", noted)
    host, slot = bench.pageable(9000), torch.zeros(9000, dtype=torch.uint8)
    bench.engine.copy_out(host, slot, bench.engine.copy_in(slot, host, bench.engine.now()))
    bench.engine.settle()
    assert seen == {(f"lowvram-copies-{way}", bench.engine.device) for way in ("in", "out")}


Memory = Callable[[Bench, int], Tensor]


def many_in(bench: Bench, memory: Memory) -> Tensor:
    """One slot, filled again and again, each time from more pieces than there are."""
    engine, slot, seen = bench.engine, torch.zeros(30_000, dtype=torch.uint8), []
    for seed in range(4):
        host = bench.pageable(30_000)
        host.copy_(values(30_000, seed))
        engine.wait(engine.copy_in(slot, host, engine.now()))
        seen.append(slot.clone())
    return torch.cat(seen)


def asked_ahead(bench: Bench, memory: Memory) -> Tensor:
    """Several slots on their way before the first is waited for."""
    engine, slots = bench.engine, [torch.zeros(9000, dtype=torch.uint8) for _ in range(5)]
    hosts = [bench.pageable(9000).copy_(values(9000, seed)) for seed in range(5)]
    moments = [engine.copy_in(slot, host, engine.now()) for slot, host in zip(slots, hosts, strict=True)]
    for moment in moments:
        engine.wait(moment)
    return torch.cat(slots)


def a_slot_out_and_in_again(bench: Bench, memory: Memory) -> Tensor:
    """It may be filled again only when it has been copied out."""
    engine, slot, target = bench.engine, values(8000, 1), memory(bench, 8000)
    source = bench.pageable(8000).copy_(values(8000, 2))
    bench.shut(0.3)
    out = engine.copy_out(target, slot, engine.now())
    engine.wait(engine.copy_in(slot, source, out))
    engine.settle()
    return torch.cat([slot, target])


def in_and_out_without_a_computation(bench: Bench, memory: Memory) -> Tensor:
    engine, slot, target = bench.engine, torch.zeros(8000, dtype=torch.uint8), memory(bench, 8000)
    source = bench.pageable(8000).copy_(values(8000, 3))
    engine.copy_out(target, slot, engine.copy_in(slot, source, engine.now()))
    engine.settle()
    return target.clone()


def out_and_in_by_way_of_the_device(bench: Bench, memory: Memory) -> Tensor:
    """What comes in is what went out before, which only a computation waited for."""
    engine, slot, there = bench.engine, values(8000, 4), torch.zeros(8000, dtype=torch.uint8)
    host = memory(bench, 8000)
    if bench.cuda is not None:
        bench.cuda.gate.clear()
    engine.wait(engine.copy_out(host, slot, engine.now()))
    moment = engine.copy_in(there, host, engine.now())
    bench.let_it_try(moment)
    engine.wait(moment)
    engine.settle()
    return there


def out_of_more_pieces_than_there_are(bench: Bench, memory: Memory) -> Tensor:
    """The host reads what came out once everything is settled."""
    engine, host = bench.engine, bench.pageable(50_000)
    bench.shut(0.2)
    engine.copy_out(host, values(50_000, 5), engine.now())
    engine.settle()
    return host.clone()


def of_every_shape(bench: Bench, memory: Memory) -> Tensor:
    """As the decoder's cache has them: other dtypes, and slots that are no stretch of bytes."""
    engine = bench.engine
    wide = values(16_000, 6).view(torch.bfloat16).view(8, 10, 100).nan_to_num()
    hosts = [bench.pageable(8000).view(torch.bfloat16).view(8, 5, 100) for _ in range(2)]
    for host, slot in zip(hosts, (wide[:, ::2], wide[:, 5:].contiguous()), strict=True):
        engine.copy_out(host, slot, engine.now())
    engine.settle()
    back = torch.zeros(8, 10, 100, dtype=torch.bfloat16)
    engine.wait(engine.copy_in(back[:, ::2], hosts[0], engine.now()))
    return torch.cat([back.flatten(), hosts[1].flatten()]).view(torch.uint8)


WORKS = [
    many_in,
    asked_ahead,
    a_slot_out_and_in_again,
    in_and_out_without_a_computation,
    out_and_in_by_way_of_the_device,
    out_of_more_pieces_than_there_are,
    of_every_shape,
]
MEMORY = {"pageable": Bench.pageable, "pinned": Bench.pinned}


def right(monkeypatch: pytest.MonkeyPatch, work: Callable[[Bench, Memory], Tensor], memory: str) -> bool:
    expected = work(Bench(Engine(CPU)), MEMORY[memory])
    with monkeypatch.context() as patch:
        found = work(staged(patch), MEMORY[memory])
    return torch.equal(found, expected)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
def test_the_same_bytes(monkeypatch, work, memory):
    assert right(monkeypatch, work, memory)


def of(text: str, instead: str, breaks: str, file: str = "lowvram/offload/staged_copies.py") -> Mutation:
    return Mutation(file, text, instead, breaks)


MUTATIONS = [
    of("            mark.pass_on_host()\n", "            pass\n", "a piece is filled while it is copied from"),
    of(
        "                self._ring.used(turn, self._way.mark())\n",
        "                pass\n",
        "nobody knows that a piece is in use",
    ),
    of(
        "                    _wait(self._way, after)\n",
        "                    pass\n",
        "a fill overtakes who reads the slot",
    ),
    of(
        "        _wait(self._way, after)\n        coming",
        "        coming",
        "a copy out overtakes what it copies",
    ),
    of("    _wait(way, after)\n    way.copy", "    way.copy", "copies of pinned memory wait for nothing"),
    of("    there.pass_on_host()\n", "    pass\n", "bytes are taken before they have come"),
    of(
        "                        before.landed.result()\n",
        "                        pass\n",
        "bytes are read before they have landed",
    ),
    of(
        "            porter.settle()\n",
        "            pass\n",
        "the host does not wait for threads",
    ),
    of(
        "            self._staging.settle()\n",
        "            pass\n",
        "settling leaves the threads out",
        "lowvram/offload/copy_engine.py",
    ),
    of(
        "            moment = self._staging.asked(moment)\n",
        "            pass\n",
        "computations do not wait for staged copies",
        "lowvram/offload/copy_engine.py",
    ),
    of(
        "        self.event.synchronize()\n",
        "        pass\n",
        "the host passes every mark",
        "lowvram/offload/copy_engine.py",
    ),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_each_wait_is_needed(monkeypatch, mutation):
    with mutation.made():
        assert not all(right(monkeypatch, work, memory) for memory in MEMORY for work in WORKS[:6]), mutation.breaks


def test_tensors_of_inference_mode_are_copied(monkeypatch):
    with torch.inference_mode():
        assert right(monkeypatch, many_in, "pageable")
        assert right(monkeypatch, a_slot_out_and_in_again, "pageable")


def failing_once(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real, count = CudaWay.copy, iter(range(10**6))

    def copy(way: Any, dst: Tensor, src: Tensor) -> None:
        if next(count) == number:
            raise RuntimeError("CUDA error: unspecified launch failure")
        real(way, dst, src)

    monkeypatch.setattr(CudaWay, "copy", copy)


@pytest.mark.parametrize("number", [0, 2])
def test_a_copy_that_fails_in_a_thread_is_told_to_who_waits_for_it(monkeypatch, number):
    bench = staged(monkeypatch)
    engine, slot, host = bench.engine, torch.zeros(9000, dtype=torch.uint8), bench.pageable(9000)
    failing_once(monkeypatch, number)
    moment = engine.copy_in(slot, host, engine.now())
    with pytest.raises(DeviceError, match=r"a copy of 9000 bytes to the device failed .*launch failure"):
        engine.wait(moment)
    engine.settle()  # it is told once
    engine.wait(engine.copy_in(slot, host.fill_(3), engine.now()))
    assert slot.sum() == 27_000


@pytest.mark.parametrize("how", ["settle", "copy"])
def test_a_copy_that_fails_and_that_nobody_waits_for_is_told(monkeypatch, how):
    bench = staged(monkeypatch)
    engine, slot, host = bench.engine, torch.zeros(9000, dtype=torch.uint8), bench.pageable(9000)
    failing_once(monkeypatch, 1)
    moment = engine.copy_out(host, slot, engine.now())
    concurrent.futures.wait([moment.landed], timeout=10)
    with pytest.raises(DeviceError, match="a copy of 9000 bytes from the device failed"):
        engine.settle() if how == "settle" else engine.copy_out(host, slot, engine.now())


def test_garbage_that_a_thread_collects_does_not_wait_for_that_thread(monkeypatch):
    """Slots go, and with them waits are asked for, in whatever thread collects garbage."""
    bench = staged(monkeypatch)
    engine, host = bench.engine, bench.pageable(100).fill_(5)
    slots = [torch.zeros(100, dtype=torch.uint8) for _ in range(2)]
    later: list[Moment] = []
    asked, real = threading.Event(), CudaWay.copy

    def copy(way: Any, dst: Tensor, src: Tensor) -> None:
        asked.wait(10)
        while later:
            engine.wait(later.pop())  # of a copy that this thread comes to only afterwards
        real(way, dst, src)

    monkeypatch.setattr(CudaWay, "copy", copy)
    first = engine.copy_in(slots[0], host, engine.now())
    later.append(engine.copy_in(slots[1], host, engine.now()))
    asked.set()
    engine.wait(first)
    assert slots[0].sum() == 500
    engine.now()  # the next of the computation's own calls waits instead
    assert slots[1].sum() == 500


def test_threads_end_with_their_engine(monkeypatch):
    bench = staged(monkeypatch)
    threads = list(staging_threads())
    assert len(threads) >= 2
    engine: CudaEngine | None = bench.engine
    assert engine is not None
    engine.wait(engine.copy_in(torch.zeros(9000, dtype=torch.uint8), bench.pageable(9000), engine.now()))
    mine = {engine._staging._in.thread, engine._staging._out.thread}
    del bench, engine
    gc.collect()
    for thread in mine:
        thread.join(10)
        assert not thread.is_alive()


def test_what_was_pinned_and_how_copies_go_is_said_once_and_reported(monkeypatch, caplog):
    bench = staged(monkeypatch)
    buffers = [bench.engine.host_buffer(5000) for _ in range(3)]
    assert len(buffers) == 3
    (message,) = [record.getMessage() for record in caplog.records]
    assert "the driver returned 2" in message
    assert "beside the computation but slower" in message
    assert bench.engine.host_memory() == {
        "pinned_bytes": 8192,
        "pageable_bytes": (1 << 20) + 15_000,
        "driver_status": 2,
        "copies": "beside the computation, through 8 pinned pieces",
    }


def latents(tiny: Any, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> tuple[Tensor, dict[str, Any]]:
    """Of a short run whose layers and rings are all on the host."""
    cells = tuple((0, layer) for layer in range(4))
    placement = Placement(streamed_layers=(0, 1, 2, 3), host_rings=cells)
    monkeypatch.setattr(runtime, "engine_for", lambda device: engine)
    pipeline = AvatarPipeline.from_artifact(
        tiny.artifact("int8"), device="cpu", memory=MemoryOptions(placement=placement)
    )
    recorder = TensorRecorder()
    for _ in pipeline.stream(tiny.request(infer_frames=12, sample_steps=1), recorder=recorder):
        pass
    return recorder.tensors()["latents"], pipeline.memory_report()


def test_a_run_computes_the_same_however_much_can_be_pinned(tiny, monkeypatch):
    expected, report = latents(tiny, monkeypatch, Engine(CPU))
    assert report["host_memory"] is None
    unlimited = LimitedDriver()
    engine, _ = cuda_engine(monkeypatch, unlimited)
    found, report = latents(tiny, monkeypatch, engine)
    assert torch.equal(found, expected)
    assert report["host_memory"]["pageable_bytes"] == 0
    engine, _ = cuda_engine(monkeypatch, LimitedDriver(unlimited.most // 2))
    found, report = latents(tiny, monkeypatch, engine)
    assert torch.equal(found, expected)
    assert report["host_memory"]["pinned_bytes"] > 0
    assert report["host_memory"]["pageable_bytes"] > 0
    assert report["host_memory"]["driver_status"] == 2
