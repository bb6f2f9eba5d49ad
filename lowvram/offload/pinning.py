"""Host memory that a GPU may copy from and to by itself ("pinned"): registered with the driver while it lives.

The driver is asked, and not CUDA's runtime, which PyTorch shows (``torch.cuda.cudart().cudaHostRegister``): where the
runtime refuses, it also keeps that as its last error. PyTorch looks for the last error behind every kernel
launch, so that the next one raises for what failed long before; and nothing that PyTorch shows clears it. The driver's
call, which the runtime's is made of, keeps nothing.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import dataclasses
import functools
import mmap
import threading
import weakref
from typing import Any, Protocol

import torch

Tensor = torch.Tensor

# Values of CUresult, as cuda.h has them.
DONE, ALREADY_REGISTERED, NO_DRIVER = 0, 712, 100
# Left free of what can be pinned, where that has an end: PyTorch, NCCL and cuBLAS pin a little, too.
SPARE_BYTES = 64 << 20
# Counts as pinned on every GPU of the process: several may copy from one mapping.
_PORTABLE = 1


class Driver(Protocol):
    """What is asked of the driver; replaced in tests."""

    def register(self, address: int, nbytes: int) -> int:
        """Its status, 0 where that worked."""
        ...

    def unregister(self, address: int) -> int: ...

    def settle(self) -> None:
        """Wait for all copies that are on their way."""
        ...


class CudaDriver:
    """The driver that PyTorch has loaded."""

    def __init__(self, library: Any):
        self._library = library

    def register(self, address: int, nbytes: int) -> int:
        self._enter()
        return int(
            self._library.cuMemHostRegister_v2(
                ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(_PORTABLE)
            )
        )

    def unregister(self, address: int) -> int:
        self._enter()
        return int(self._library.cuMemHostUnregister(ctypes.c_void_p(address)))

    def settle(self) -> None:
        # What failed on the device copies nothing any more.
        with contextlib.suppress(RuntimeError):
            for index in range(torch.cuda.device_count()):
                if torch.cuda.memory_reserved(index):  # else nothing of this process is there, not even a context
                    torch.cuda.synchronize(index)

    def _enter(self) -> None:
        """Let this thread have a context, which the runtime makes by itself and the driver wants to be there: memory is
        let go of in whatever thread collects garbage."""
        context = ctypes.c_void_p()
        self._library.cuCtxGetCurrent(ctypes.byref(context))
        if not context:
            torch.cuda.synchronize()


def driver_library() -> Any:
    """The driver's library, None where there is none."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


class Registry:
    """What is registered in this process, by its address. Memory is registered once, whoever asks how often, and given
    back before it goes: what stayed registered behind it would be read and written by later copies."""

    def __init__(self, driver: Driver | None):
        self._driver = driver
        self._sizes: dict[int, int] = {}
        self._foreign: set[int] = set()
        self._addresses: list[int] = []
        # Memory may be let go of, and collected, while this thread is in here.
        self._lock = threading.RLock()

    def pin(self, buffer: Tensor) -> int:
        """Register the whole of ``buffer``; the driver's status, 0 also where it is registered already."""
        address, nbytes = buffer.data_ptr(), buffer.nbytes
        with self._lock:
            if self._holds(address, nbytes):
                return DONE
            status = NO_DRIVER if self._driver is None else self._driver.register(address, nbytes)
            if status not in (DONE, ALREADY_REGISTERED):
                return status
            if status == ALREADY_REGISTERED:  # by another library, which gives it back
                self._foreign.add(address)
            self._sizes[address] = nbytes
            bisect.insort(self._addresses, address)
            weakref.finalize(buffer.untyped_storage(), self.unpin, address, nbytes).atexit = False
            return DONE

    def unpin(self, address: int, nbytes: int) -> None:
        """Give back what ``pin`` registered, once all copies that are on their way are done."""
        with self._lock:
            if self._sizes.get(address) != nbytes:
                return  # given back before
            del self._sizes[address]
            self._addresses.remove(address)
            if address in self._foreign:
                self._foreign.discard(address)
            elif self._driver is not None:
                self._driver.settle()
                self._driver.unregister(address)

    def pinned(self, part: Tensor) -> bool:
        """Whether all of ``part`` is registered."""
        with self._lock:
            return self._holds(part.data_ptr(), part.nbytes)

    def _holds(self, address: int, nbytes: int) -> bool:
        index = bisect.bisect_right(self._addresses, address) - 1
        if index < 0:
            return False
        begin = self._addresses[index]
        return address + nbytes <= begin + self._sizes[begin]


class Pins:
    """What one engine had pinned until the driver refused. ``status`` is that of the refusal, 0 without one."""

    def __init__(self, registry: Registry):
        self._registry = registry
        self.status = DONE
        self._pinned: list[_Kept] = []
        self._pageable: list[_Kept] = []
        self.most_pinned = self.most_pageable = 0
        """Bytes at their highest."""

    @property
    def pinned(self) -> int:
        """Bytes that are pinned now; from any thread."""
        return sum(kept.nbytes for kept in self._pinned if kept.alive)

    def add(self, buffer: Tensor) -> bool:
        """Pin ``buffer``, unless that was refused before; whether it is pinned."""
        if not buffer.nbytes:
            return True
        if self.status == DONE:
            self.status = self._registry.pin(buffer)
        kept = _Kept(buffer.data_ptr(), buffer.nbytes, weakref.ref(buffer.untyped_storage()))
        (self._pinned if self.status == DONE else self._pageable).append(kept)
        self._count()
        return self.status == DONE

    def room(self, nbytes: int) -> Tensor | None:
        """uint8 [nbytes] of pinned memory, once the driver has refused more: what was pinned last is given back for it.
        A little more is left free, for whatever else of the process needs some. None where nothing can be pinned."""
        while True:
            found, spare = mapped(nbytes), mapped(SPARE_BYTES)
            there = self._registry.pin(found) == DONE
            if there and self._registry.pin(spare) == DONE:
                return found  # and the spare memory goes
            if not self._pinned:
                return found if there else None
            self._registry.unpin(found.data_ptr(), nbytes)
            given = self._pinned.pop()
            if given.alive:
                self._registry.unpin(given.address, given.nbytes)
                self._pageable.append(given)
                self._count()

    def holds(self, part: Tensor) -> bool:
        """Whether a GPU can copy from and to ``part`` by itself."""
        return self._registry.pinned(part)

    def _count(self) -> None:
        self._pinned = [kept for kept in self._pinned if kept.alive]
        self._pageable = [kept for kept in self._pageable if kept.alive]
        self.most_pinned = max(self.most_pinned, sum(kept.nbytes for kept in self._pinned))
        self.most_pageable = max(self.most_pageable, sum(kept.nbytes for kept in self._pageable))


@dataclasses.dataclass(frozen=True)
class _Kept:
    address: int
    nbytes: int
    storage: weakref.ref[torch.UntypedStorage]

    @property
    def alive(self) -> bool:
        return self.storage() is not None


@functools.cache
def registry() -> Registry:
    """This process's."""
    library = driver_library()
    return Registry(CudaDriver(library) if library is not None else None)


def mapped(nbytes: int) -> Tensor:
    """uint8 [nbytes] of pages of their own, which can be registered at just that size: PyTorch's own pinned allocator
    takes the next power of two, and never gives back."""
    return torch.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=torch.uint8)[:nbytes]
