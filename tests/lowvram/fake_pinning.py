"""A driver that pins only so much, and streams that copy as late as they may, for several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lowvram.offload import copy_engine as engine_module
from lowvram.offload import pinning
from lowvram.offload.copy_engine import CudaEngine, CudaWay
from lowvram.offload.pinning import ALREADY_REGISTERED, Registry

Tensor = torch.Tensor
OUT_OF_MEMORY = 2


class LimitedDriver:
    """A ``lowvram.offload.pinning.Driver``; notes what is registered, and everything that was asked."""

    def __init__(self, limit: int = 1 << 40):
        self.limit, self.live, self.most = limit, dict[int, int](), 0
        self.asked: list[tuple[str, int]] = []

    def register(self, address: int, nbytes: int) -> int:
        self.asked.append(("register", nbytes))
        assert nbytes > 0
        if any(address < a + n and a < address + nbytes for a, n in self.live.items()):
            return ALREADY_REGISTERED
        if sum(self.live.values()) + nbytes > self.limit:
            return OUT_OF_MEMORY
        self.live[address] = nbytes
        self.most = max(self.most, sum(self.live.values()))
        return 0

    def unregister(self, address: int) -> int:
        assert self.asked[-1][0] == "settle", "copies may be on their way"
        self.asked.append(("unregister", self.live.pop(address)))
        return 0

    def settle(self) -> None:
        self.asked.append(("settle", 0))

    def holds(self, tensor: Tensor) -> bool:
        return any(a <= tensor.data_ptr() < a + n for a, n in self.live.items())


class Cuda:
    """Streams of one device. Computations run at once, copies when somebody waits for them. While ``gate`` is shut, the
    threads that copy out wait for it before they look whether something has come."""

    def __init__(self, driver: LimitedDriver):
        self.driver, self.lock = driver, threading.RLock()
        self.streams: list[Stream] = []
        self.gate = threading.Event()
        self.gate.set()
        self.compute = Stream(self)

    def synchronize(self, device: object = None) -> None:
        for stream in reversed(self.streams):  # copies out before copies in, unless something has them wait
            stream.run(len(stream.asked))


class Stream:
    def __init__(self, cuda: Cuda, device: object = None):
        self.cuda, self.asked, self.done = cuda, list[Any](), 0
        cuda.streams.append(self)

    def wait_event(self, event: Event) -> None:
        with self.cuda.lock:
            self.asked.append(event)
            if self is self.cuda.compute:
                self.run(len(self.asked))

    def copy(self, dst: Tensor, src: Tensor) -> None:
        with self.cuda.lock:
            self.asked.append((dst, src))
            # The host waits for copies of memory that is not pinned.
            if not (self.cuda.driver.holds(dst) or self.cuda.driver.holds(src)):
                self.run(len(self.asked))

    def run(self, count: int) -> None:
        with self.cuda.lock, torch.inference_mode():
            while self.done < count:
                item = self.asked[self.done]
                self.asked[self.done] = None
                self.done += 1
                if isinstance(item, Event):
                    item.pass_by()
                else:
                    item[0].copy_(item[1])


class Event:
    def __init__(self, cuda: Cuda):
        self.cuda, self.point = cuda, None

    def record(self, stream: Stream) -> None:
        with self.cuda.lock:
            self.point = (stream, len(stream.asked))

    def synchronize(self) -> None:
        if threading.current_thread().name.startswith("lowvram-copies-out"):
            self.cuda.gate.wait(20)
        self.pass_by()

    def pass_by(self) -> None:
        if self.point is not None:
            stream, count = self.point
            stream.run(count)


def cuda_engine(
    monkeypatch: pytest.MonkeyPatch, driver: LimitedDriver, registry: Registry | None = None
) -> tuple[CudaEngine, Cuda]:
    """The real engine over CPU tensors; pinned pieces of 4 KiB."""
    cuda, registry = Cuda(driver), registry or Registry(driver)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: Stream(cuda))
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event(cuda))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: cuda.compute)
    monkeypatch.setattr(torch.cuda, "synchronize", cuda.synchronize)
    for name in ("max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: 0)
    monkeypatch.setattr(CudaWay, "copy", lambda way, dst, src: way.stream.copy(dst, src))
    monkeypatch.setattr(engine_module, "registry", lambda: registry)
    monkeypatch.setattr(engine_module, "PIECE_BYTES", 4096)
    monkeypatch.setattr(pinning, "SPARE_BYTES", 4096)
    return CudaEngine(torch.device("cpu")), cuda


def staging_threads() -> Iterator[threading.Thread]:
    return (thread for thread in threading.enumerate() if thread.name.startswith("lowvram-copies"))
