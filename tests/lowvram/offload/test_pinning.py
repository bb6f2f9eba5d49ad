"""Host memory is registered once for as long as it lives, without leaving an error behind, and given back."""

from __future__ import annotations

import gc
import mmap
import os
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from lowvram.offload import pinning
from lowvram.offload.copy_engine import Engine
from lowvram.offload.layers import HostCopies
from lowvram.offload.pinning import ALREADY_REGISTERED, NO_DRIVER, CudaDriver, Pins, Registry, mapped
from lowvram.parallel.shared_weights import SharedSlabs
from lowvram_kernels.errors import OutOfMemoryError
from tests.lowvram.fake_pinning import OUT_OF_MEMORY, LimitedDriver, cuda_engine


def test_memory_is_registered_at_its_own_size_and_given_back_before_it_goes(monkeypatch):
    driver, unmapped = LimitedDriver(), []

    class Pages(mmap.mmap):
        def __del__(self) -> None:
            unmapped.append(dict(driver.live))

    monkeypatch.setattr(pinning, "mmap", SimpleNamespace(mmap=Pages))
    engine, _ = cuda_engine(monkeypatch, driver)
    buffer = engine.host_buffer(5000)
    assert driver.live == {buffer.data_ptr(): 5000}
    assert buffer.data_ptr() % mmap.PAGESIZE == 0
    view = buffer[100:200].view(torch.int16)
    del buffer
    gc.collect()
    assert len(driver.live) == 1
    del view
    gc.collect()
    assert driver.live == {}
    assert unmapped == [{}]
    assert engine.host_buffer(0).numel() == 0


def test_a_range_is_registered_once_whoever_asks():
    driver = LimitedDriver()
    registry, buffer = Registry(driver), mapped(8192)
    engines = [Pins(registry) for _ in range(3)]
    assert all(pins.add(buffer) for pins in engines)
    assert engines[0].add(buffer[:4096])
    assert driver.asked == [("register", 8192)]
    assert registry.pinned(buffer[5000:])
    assert not registry.pinned(mapped(10))
    assert all(pins.status == 0 for pins in engines)


def test_what_another_library_registered_counts_and_is_left_to_it():
    driver = LimitedDriver()
    registry, buffer = Registry(driver), mapped(8192)
    driver.live[buffer.data_ptr()] = 8192
    pins = Pins(registry)
    assert driver.register(buffer.data_ptr(), 8192) == ALREADY_REGISTERED
    assert pins.add(buffer)
    more = mapped(100)
    assert pins.add(more)  # and pinning goes on
    del buffer, more
    gc.collect()
    assert list(driver.live.values()) == [8192]


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory files are Linux's")
def test_a_retry_finds_shared_slabs_registered(monkeypatch):
    """As when loading the DiT runs out of memory and is done again: new host copies over the slabs of before."""
    driver = LimitedDriver()
    engine, _ = cuda_engine(monkeypatch, driver)
    slabs = SharedSlabs.create([5000, 7000])
    for _ in range(3):
        copies = HostCopies(engine, slabs)
        for index, size in enumerate((5000, 7000)):
            assert copies.keep(index, torch.ones(size, dtype=torch.uint8)).sum() == size
    assert driver.asked == [("register", 5000), ("register", 7000)]
    assert engine.host_memory()["driver_status"] == 0
    del slabs, copies
    gc.collect()
    assert driver.live == {}


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory files are Linux's")
def test_shared_slabs_leave_no_open_file():
    before = set(os.listdir("/proc/self/fd"))
    slabs = SharedSlabs.create([5000])
    slabs.slab(0, torch.ones(5000, dtype=torch.uint8))
    there = set(os.listdir("/proc/self/fd")) - before
    del slabs
    gc.collect()
    assert there
    assert not there & set(os.listdir("/proc/self/fd"))


def test_a_run_that_fails_in_the_middle_leaves_nothing_registered(monkeypatch):
    driver = LimitedDriver()
    engine, _ = cuda_engine(monkeypatch, driver)

    def load() -> None:
        copies, kept = HostCopies(engine), []
        for index in range(4):
            kept.append(copies.keep(index, torch.ones(5000, dtype=torch.uint8)))
            if index == 2:
                raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        load()
    gc.collect()
    assert driver.most == 15000
    assert driver.live == {}


def test_memory_is_let_go_of_in_any_thread():
    driver = LimitedDriver()
    registry, held = Registry(driver), [mapped(4096)]
    registry.pin(held[0])
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join(5)
    assert driver.live == {}


def test_the_driver_is_asked_and_not_the_runtime(monkeypatch):
    """The runtime would keep its refusal as the last error, for the next launch to raise."""

    def runtime() -> None:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "cudart", runtime)
    calls = []

    class Library:
        def cuCtxGetCurrent(self, context):
            context._obj.value = 7 if calls else None
            return 0

        def cuMemHostRegister_v2(self, address, nbytes, flags):
            calls.append((address.value, nbytes.value, flags.value))
            return OUT_OF_MEMORY

        def cuMemHostUnregister(self, address):
            calls.append(address.value)
            return 0

    made = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: made.append("a context"))
    driver = CudaDriver(Library())
    registry, buffer = Registry(driver), mapped(4096)
    assert registry.pin(buffer) == OUT_OF_MEMORY
    assert calls == [(buffer.data_ptr(), 4096, 1)]
    assert made == ["a context"]
    assert driver.unregister(4096) == 0
    assert calls[1:] == [4096]
    assert made == ["a context"]


def test_without_a_driver_nothing_is_pinned(monkeypatch, caplog):
    engine, _ = cuda_engine(monkeypatch, LimitedDriver(), Registry(None))
    buffers = [engine.host_buffer(4096) for _ in range(3)]
    assert buffers[2].fill_(7).sum() == 7 * 4096
    assert engine.host_memory() == {
        "pinned_bytes": 0,
        "pageable_bytes": 3 * 4096,
        "driver_status": NO_DRIVER,
        "copies": "in its way",
    }
    (message,) = [record.getMessage() for record in caplog.records]
    assert "cannot be pinned here (the driver returned 100)" in message


def test_room_for_pieces_is_made_by_giving_back_what_was_pinned_last(monkeypatch):
    monkeypatch.setattr(pinning, "SPARE_BYTES", 1000)
    driver = LimitedDriver(10_000)
    pins = Pins(Registry(driver))
    buffers = [mapped(3000) for _ in range(4)]
    assert [pins.add(buffer) for buffer in buffers] == [True, True, True, False]
    assert pins.status == OUT_OF_MEMORY
    room = pins.room(3500)
    assert room.numel() == 3500
    gc.collect()
    assert [pins.holds(buffer) for buffer in buffers] == [True, False, False, False]
    assert sorted(driver.live.values()) == [3000, 3500]
    assert (pins.most_pinned, pins.most_pageable) == (9000, 9000)
    assert not pins.add(mapped(10))  # nothing more is tried
    assert pins.room(1 << 20) is None
    assert sum(driver.live.values()) == 3500


@pytest.mark.parametrize("error", [OSError(12, "Cannot allocate memory"), MemoryError("no"), RuntimeError("no")])
def test_a_host_with_too_little_memory(monkeypatch, error):
    def refuse(*_args) -> None:
        raise error

    engine, _ = cuda_engine(monkeypatch, LimitedDriver())
    monkeypatch.setattr(pinning, "mmap", SimpleNamespace(mmap=refuse))
    with pytest.raises(OutOfMemoryError, match=r"2\.00 GiB of host memory needed, .* GiB free .*--size"):
        engine.host_buffer(2 << 30)


def test_weights_are_copied_to_where_copies_can_start_from(monkeypatch):
    engine, _ = cuda_engine(monkeypatch, LimitedDriver())
    content = torch.arange(100, dtype=torch.uint8)
    kept = engine.keep_on_host(content)
    assert torch.equal(kept, content)
    assert kept.data_ptr() != content.data_ptr()
    assert Engine(torch.device("cpu")).host_memory() is None
