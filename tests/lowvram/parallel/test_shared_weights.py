"""Streamed layers lie once in a machine's memory, whoever writes them first, and nothing stays behind."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch

from lowvram.offload.copy_engine import Engine
from lowvram.offload.layers import HostCopies
from lowvram.parallel.shared_weights import SharedSlabs
from lowvram_kernels.errors import OutOfMemoryError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory files are Linux's")
SIZES = [5000, 1 << 20, 123_457]


def content(index: int) -> torch.Tensor:
    return torch.arange(SIZES[index]).add(index).remainder(251).to(torch.uint8)


def unreadable(index: int) -> torch.Tensor:
    """Of the right size; whoever writes it would be found out."""
    return torch.zeros(SIZES[index], dtype=torch.uint8)


class Pinning(Engine):
    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.pinned: list[int] = []

    def pin(self, buffer: torch.Tensor) -> None:
        self.pinned.append(buffer.nbytes)


def in_another_process(path: str, results: multiprocessing.Queue) -> None:
    slabs = SharedSlabs.open(path, SIZES)
    there = bytes(slabs.slab(1, unreadable(1)).numpy()) == bytes(content(1).numpy())
    slabs.slab(2, content(2))
    results.put(there)


def test_two_processes_have_the_same_bytes_and_the_same_memory():
    slabs = SharedSlabs.create(SIZES)
    first = slabs.slab(1, content(1))
    assert torch.equal(first, content(1))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    other = context.Process(target=in_another_process, args=(slabs.path, results))
    other.start()
    assert results.get(timeout=60) is True  # what this process wrote, and not what that one had
    other.join(60)
    assert other.exitcode == 0
    assert torch.equal(slabs.slab(2, unreadable(2)), content(2))  # what that process wrote


def test_memory_is_taken_only_for_what_is_written():
    slabs = SharedSlabs.create([1 << 26] * 4)
    before = os.stat(slabs.path).st_blocks
    slabs.slab(2, torch.ones(1 << 26, dtype=torch.uint8))
    taken = (os.stat(slabs.path).st_blocks - before) * 512
    assert 1 << 26 <= taken <= (1 << 26) + (1 << 16)  # and a page that says what is written


def test_a_slab_is_mapped_and_registered_once():
    engine = Pinning()
    copies = HostCopies(engine, SharedSlabs.create(SIZES))
    one, same = copies.keep(0, content(0)), copies.keep(0, unreadable(0))
    assert one.data_ptr() == same.data_ptr()
    assert torch.equal(same, content(0))
    copies.keep(2, content(2))
    assert engine.pinned == [SIZES[0], SIZES[2]]


def test_without_other_ranks_the_engine_keeps_the_bytes():
    mapped = content(0)
    assert HostCopies(Engine(torch.device("cpu"))).keep(0, mapped) is mapped


def test_memory_that_is_not_there_is_told(monkeypatch):
    slabs = SharedSlabs.create(SIZES)

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutOfMemoryError, match="5000 bytes of host memory"):
        slabs.slab(0, content(0))


def test_nothing_has_a_name_that_could_stay_behind():
    slabs = SharedSlabs.create(SIZES)
    slabs.slab(0, content(0))
    assert os.readlink(slabs.path).startswith("/memfd:")
    assert not list(Path("/dev/shm").glob("lowvram*"))
