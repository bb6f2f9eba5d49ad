"""Copies between host and device beside the computation, and the host memory that they need.

On CUDA, copies in and out run on streams of their own and wait for each other through events: nothing here makes the
host wait, except ``settle``; and ``wait`` until a copy is asked for, where host memory could not be pinned. On the
CPU, and on the simulated device, the same calls copy at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import psutil
import torch

from lowvram.byte_sizes import gib
from lowvram.devices import current, is_out_of_memory
from lowvram.offload.events import DONE, Mark, Moment
from lowvram.offload.pinning import Pins, mapped, registry
from lowvram.offload.staged_copies import PIECE_BYTES, PIECES, StagedMoment, Staging
from lowvram_kernels.errors import DeviceError, OutOfMemoryError

Tensor = torch.Tensor
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peaks:
    """Bytes that an allocator has handed out and holds, at their highest."""

    allocated: int
    reserved: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of a device now: handed out and held by its allocator, and free for whoever asks."""

    allocated: int
    reserved: int
    free: int


class Engine:
    """Copies of one device, done at once, and its memory; counts the bytes that cross. See ``engine_for``."""

    def __init__(self, device: torch.device):
        self.device = device
        self.apart = device.type != "cpu"
        """Whether memory of the device is other memory than the host's."""
        self.bytes_in = self.bytes_out = 0
        self._spare: dict[int, list[Tensor]] = {}

    def host_buffer(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of host memory, its values undefined.

        Raises:
            OutOfMemoryError: the host has too little.
        """
        if spare := self._spare.get(nbytes):
            return spare.pop()
        try:
            return self._host_buffer(nbytes)
        except (MemoryError, OSError, RuntimeError) as error:
            free = psutil.virtual_memory().available
            raise OutOfMemoryError(
                f"{gib(nbytes)} of host memory needed, {gib(free)} free ({error}); close other programs, or give the "
                "run more --vram-budget or a smaller --size"
            ) from error

    def spare(self, buffers: Iterable[Tensor]) -> None:
        """Take back buffers of ``host_buffer``, for whoever asks for as many bytes: pinning takes seconds for each
        10 GB."""
        for buffer in buffers:
            self._spare.setdefault(buffer.nbytes, []).append(buffer)

    def drop_spare(self) -> None:
        """Give back to the host what was spared."""
        self._spare.clear()

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

    def peaks(self) -> Peaks | None:
        """Of the device's allocator since ``reset_peaks``; None where nobody counts, as on the CPU."""
        return None

    def reset_peaks(self) -> None:
        """Count peaks from here on."""

    def memory(self) -> Held | None:
        """Of the device now, from any thread; None where nobody counts, as on the CPU."""
        return None

    def pinned_bytes(self) -> int:
        """Of host memory, now."""
        return 0

    def empty_cache(self) -> None:
        """Give back to the device what nobody holds any more."""
        gc.collect()

    def host_memory(self) -> dict[str, Any] | None:
        """For a run's report: bytes of host memory pinned and not, at their highest, and how copies go. None where
        nothing is pinned."""
        return None

    def _host_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def _copy_in(self, dst: Tensor, src: Tensor, after: tuple[Moment, ...]) -> Moment:
        dst.copy_(src)
        return DONE

    def _copy_out(self, dst: Tensor, src: Tensor, after: tuple[Moment, ...]) -> Moment:
        dst.copy_(src)
        return DONE


class CudaMoment(Mark):
    def __init__(self, stream: torch.cuda.Stream):
        self.event = torch.cuda.Event()
        self.event.record(stream)

    def pass_on_host(self) -> None:
        self.event.synchronize()


class CudaWay:
    """A stream that copies in one direction."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)

    def wait(self, moment: Moment) -> None:
        if isinstance(moment, CudaMoment):
            self.stream.wait_event(moment.event)

    def copy(self, dst: Tensor, src: Tensor) -> None:
        with torch.cuda.stream(self.stream):
            dst.copy_(src, non_blocking=True)

    def mark(self) -> Mark:
        return CudaMoment(self.stream)


class CudaEngine(Engine):
    """One stream inwards and one outwards: PCIe carries both directions at once."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.apart = True
        self._inwards, self._outwards = CudaWay(device), CudaWay(device)
        self._pins = Pins(registry())
        self._staging: Staging | None = None
        self._put_off: list[Moment] = []

    def _host_buffer(self, nbytes: int) -> Tensor:
        buffer = mapped(nbytes)
        self.pin(buffer)
        return buffer

    def pin(self, buffer: Tensor) -> None:
        could = self._pins.status == 0
        if not self._pins.add(buffer) and could:
            self._do_with_less()

    def _do_with_less(self) -> None:
        """The driver has refused to pin more. WSL has a limit of about 1 GiB, Windows one that follows the card."""
        status, ring = self._pins.status, self._pins.room(2 * PIECES * PIECE_BYTES)
        if ring is None:
            log.warning(
                "host memory cannot be pinned here (the driver returned %d): copies to the GPU will not run beside the "
                "computation, and the run takes longer; `lowvram doctor` says more",
                status,
            )
            return
        log.warning(
            "only a part of the host memory can be pinned here (the driver returned %d): the rest is copied through %s "
            "of pinned memory, beside the computation but slower; `lowvram doctor` says more",
            status,
            gib(ring.nbytes),
        )
        context = functools.partial(current, self.device)  # no method of this engine: threads would keep it alive
        self._staging = Staging(self._inwards, self._outwards, ring, self._pins.holds, _failing, context)

    def host_memory(self) -> dict[str, Any] | None:
        copies = "beside the computation"
        if self._pins.status:
            copies = "in its way" if self._staging is None else f"{copies}, through {2 * PIECES} pinned pieces"
        return {
            "pinned_bytes": self._pins.most_pinned,
            "pageable_bytes": self._pins.most_pageable,
            "driver_status": self._pins.status,
            "copies": copies,
        }

    def keep_on_host(self, mapped: Tensor) -> Tensor:
        return self.host_buffer(mapped.numel()).copy_(mapped)

    def _copy_in(self, dst: Tensor, src: Tensor, after: tuple[Moment, ...]) -> Moment:
        if self._staging is not None:
            return self._staging.copy_in(dst, src, after)
        return self._copy(self._inwards, dst, src, after)

    def _copy_out(self, dst: Tensor, src: Tensor, after: tuple[Moment, ...]) -> Moment:
        if self._staging is not None:
            return self._staging.copy_out(dst, src, after)
        return self._copy(self._outwards, dst, src, after)

    def _copy(self, way: CudaWay, dst: Tensor, src: Tensor, after: tuple[Moment, ...]) -> Moment:
        for moment in after:
            way.wait(moment)
        way.copy(dst, src)
        return way.mark()

    def now(self) -> Moment:
        self._catch_up()
        return CudaMoment(torch.cuda.current_stream(self.device))

    def wait(self, moment: Moment) -> None:
        if self._staging is not None and self._staging.in_a_thread_of_its_own():
            # What collects garbage there lets go of slots, and would wait for its own thread.
            self._put_off.append(moment)
            return
        self._catch_up()
        self._wait(moment)

    def _catch_up(self) -> None:
        while self._put_off:
            self._wait(self._put_off.pop())

    def _wait(self, moment: Moment) -> None:
        if isinstance(moment, StagedMoment) and self._staging is not None:
            moment = self._staging.asked(moment)
        if isinstance(moment, CudaMoment):
            torch.cuda.current_stream(self.device).wait_event(moment.event)

    def settle(self) -> None:
        if self._staging is not None:
            self._staging.settle()
        torch.cuda.synchronize(self.device)

    def peaks(self) -> Peaks | None:
        return Peaks(
            allocated=torch.cuda.max_memory_allocated(self.device),
            reserved=torch.cuda.max_memory_reserved(self.device),
        )

    def reset_peaks(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def memory(self) -> Held | None:
        free, _ = torch.cuda.mem_get_info(self.device)
        return Held(
            allocated=torch.cuda.memory_allocated(self.device),
            reserved=torch.cuda.memory_reserved(self.device),
            free=free,
        )

    def pinned_bytes(self) -> int:
        return self._pins.pinned

    def empty_cache(self) -> None:
        super().empty_cache()
        torch.cuda.empty_cache()


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
