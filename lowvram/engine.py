"""Copies between host and device beside the computation, and the host memory that they need.

On CUDA, copies in and out run on streams of their own and wait for each other through events: nothing here makes the
host wait, except ``settle``. On the CPU, and on the simulated device, the same calls copy at once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import mmap
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch

from lowvram.byte_sizes import gib
from lowvram.out_of_memory import is_out_of_memory
from lowvram_kernels.errors import DeviceError, OutOfMemoryError

Tensor = torch.Tensor
log = logging.getLogger(__name__)


class Moment:
    """A point in the device's work. This one has passed already."""


DONE = Moment()


class Engine:
    """Copies of one device, done at once; counts the bytes that cross. See ``engine_for``."""

    def __init__(self, device: torch.device):
        self.device = device
        self.apart = device.type != "cpu"
        """Whether memory of the device is other memory than the host's."""
        self.bytes_in = self.bytes_out = 0

    def host_buffer(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of host memory, its values undefined.

        Raises:
            OutOfMemoryError: the host has too little.
        """
        try:
            return self._host_buffer(nbytes)
        except (MemoryError, OSError, RuntimeError) as error:
            free = psutil.virtual_memory().available
            raise OutOfMemoryError(
                f"{gib(nbytes)} of host memory needed, {gib(free)} free ({error}); close other programs, or give the "
                "run more --vram-budget or a smaller --size"
            ) from error

    def keep_on_host(self, mapped: Tensor) -> Tensor:
        """The bytes of a mapped file, ready to be copied from again and again: as they are, where nothing is gained
        by moving them."""
        return mapped

    def pin(self, buffer: Tensor) -> None:
        """Make copies from host memory that is there already run beside the computation, where that is possible."""

    def copy_in(self, dst: Tensor, src: Tensor, *after: Moment) -> Moment:
        """Copy host to device, not before ``after``; returns the moment when it is done."""
        self.bytes_in += src.nbytes
        with _failing("to", src.nbytes):
            return self._copy_in(dst, src, after)

    def copy_out(self, dst: Tensor, src: Tensor, *after: Moment) -> Moment:
        """Copy device to host, not before ``after``; returns the moment when it is done."""
        self.bytes_out += src.nbytes
        with _failing("from", src.nbytes):
            return self._copy_out(dst, src, after)

    def now(self) -> Moment:
        """The moment when everything that was asked of the device so far is computed."""
        return DONE

    def wait(self, moment: Moment) -> None:
        """Let what is computed from here on wait for ``moment``; the host does not wait."""

    def settle(self) -> None:
        """Let the host wait until everything is copied and computed."""

    def _host_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def _copy_in(self, dst: Tensor, src: Tensor, after: tuple[Moment, ...]) -> Moment:
        dst.copy_(src)
        return DONE

    def _copy_out(self, dst: Tensor, src: Tensor, after: tuple[Moment, ...]) -> Moment:
        dst.copy_(src)
        return DONE


class CudaMoment(Moment):
    def __init__(self, stream: torch.cuda.Stream):
        self.event = torch.cuda.Event()
        self.event.record(stream)


class CudaEngine(Engine):
    """One stream inwards and one outwards: PCIe carries both directions at once."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.apart = True
        self._inwards, self._outwards = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._can_pin = True

    def _host_buffer(self, nbytes: int) -> Tensor:
        # An anonymous mapping of these bytes, registered: torch's own pinned allocator rounds up to a power of two,
        # which takes up to twice the memory of a slab.
        pages = mmap.mmap(-1, max(nbytes, 1))
        buffer = torch.frombuffer(pages, dtype=torch.uint8)[:nbytes]
        self._try_to_pin(buffer, len(pages))
        return buffer

    def pin(self, buffer: Tensor) -> None:
        self._try_to_pin(buffer, buffer.nbytes)

    def _try_to_pin(self, buffer: Tensor, nbytes: int) -> None:
        if self._can_pin:
            self._can_pin = self._pin(buffer, nbytes)

    def keep_on_host(self, mapped: Tensor) -> Tensor:
        return self.host_buffer(mapped.numel()).copy_(mapped)

    def _pin(self, buffer: Tensor, nbytes: int) -> bool:
        runtime: Any = torch.cuda.cudart()
        status = int(runtime.cudaHostRegister(buffer.data_ptr(), nbytes, 0))
        if status == 0:
            settle = functools.partial(torch.cuda.synchronize, self.device)
            weakref.finalize(buffer.untyped_storage(), _unpin, runtime, settle, buffer.data_ptr())
            return True
        log.warning(
            "host memory cannot be pinned here (cudaHostRegister returned %d; WSL and limits on locked memory do "
            "that): copies to the GPU will not run beside the computation, and the run takes longer",
            status,
        )
        return False

    def _copy_in(self, dst: Tensor, src: Tensor, after: tuple[Moment, ...]) -> Moment:
        return self._copy(self._inwards, dst, src, after)

    def _copy_out(self, dst: Tensor, src: Tensor, after: tuple[Moment, ...]) -> Moment:
        return self._copy(self._outwards, dst, src, after)

    def _copy(self, stream: torch.cuda.Stream, dst: Tensor, src: Tensor, after: tuple[Moment, ...]) -> Moment:
        for moment in after:
            if isinstance(moment, CudaMoment):
                stream.wait_event(moment.event)
        with torch.cuda.stream(stream):
            dst.copy_(src, non_blocking=True)
        return CudaMoment(stream)

    def now(self) -> Moment:
        return CudaMoment(torch.cuda.current_stream(self.device))

    def wait(self, moment: Moment) -> None:
        if isinstance(moment, CudaMoment):
            torch.cuda.current_stream(self.device).wait_event(moment.event)

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)


def _unpin(runtime: Any, settle: Callable[[], object], address: int) -> None:
    """Let go of host memory that copies may still be on their way from or to."""
    with contextlib.suppress(RuntimeError):  # a device that failed copies nothing any more
        settle()
    runtime.cudaHostUnregister(address)


@contextlib.contextmanager
def _failing(way: str, nbytes: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise DeviceError(
            f"a copy of {nbytes} bytes {way} the device failed ({error}); the device may have to be reset, and what "
            "was written before is kept"
        ) from error


def engine_for(device: torch.device) -> Engine:
    return CudaEngine(device) if device.type == "cuda" else Engine(device)
