"""A simulated GPU: the runtime runs unchanged on torch's ``meta`` device, and what it would take is counted.

Tensors on ``meta`` have shapes and no values. While a ``SimulatedDevice`` is entered, every storage that appears there
takes a block of a model of the caching allocator, and gives it back at the moment its last reference goes; what is
copied to and from the CPU is counted, and a device that is full raises what a real one raises. With a generation,
``meta`` stands for a GPU of it: the kernels that run are those that would run there, each launch counted and not made.

What the operations themselves do is in ``lowvram.simulate.operations``.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from lowvram.offload.copy_engine import Engine, Held, Peaks
from lowvram.simulate.allocator import AllocatorModel, DeviceFull, ExpandableAllocatorModel, MemoryBlock
from lowvram.simulate.operations import Operations, fused_attention
from lowvram_kernels.launch import telling
from lowvram_kernels.stand_ins import meta_as

Tensor = torch.Tensor

# cuBLAS' workspace, which torch takes from the caching allocator at the first matrix product and keeps: the default of
# GPUs before Hopper (two buffers of 4 MiB and eight of 16 KiB). Hopper has 32 MiB.
CUBLAS_WORKSPACE_BYTES = 2 * (4096 << 10) + 8 * (16 << 10)

_MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_int_mm", "_scaled_mm", "addmv", "mv", "dot"}


class SimulatedDevice:
    """Counts what happens on ``meta`` while it is entered. Not to be entered twice, nor from two threads.

    Args:
        capacity: bytes that may be reserved; beyond them ``torch.cuda.OutOfMemoryError``. None has no limit.
        cublas_workspace_bytes: taken at the first matrix product, as on a GPU; 0 for none.
        expandable_segments: the allocator's setting of that name.
        generation: compute capability without the dot of the GPU whose kernels run; None for those of ``meta`` itself,
            which are PyTorch's.
    """

    def __init__(
        self,
        capacity: int | None = None,
        *,
        cublas_workspace_bytes: int = CUBLAS_WORKSPACE_BYTES,
        expandable_segments: bool = False,
        generation: int | None = None,
    ):
        self.memory = ExpandableAllocatorModel(capacity) if expandable_segments else AllocatorModel(capacity)
        self.h2d_bytes = self.d2h_bytes = 0
        self.kernel_count = 0
        self._workspace_bytes = cublas_workspace_bytes
        self._generation = generation
        # Storages that are known: their block, or None where they take no memory. By the address of the C++ object,
        # which is its own as long as the storage lives.
        self._blocks: dict[int, MemoryBlock | None] = {}
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._modes = contextlib.ExitStack()

    @property
    def allocated(self) -> int:
        return self.memory.allocated

    @property
    def peak_allocated(self) -> int:
        return self.memory.peak_allocated

    @property
    def reserved(self) -> int:
        return self.memory.reserved

    @property
    def peak_reserved(self) -> int:
        return self.memory.peak_reserved

    @functools.cached_property
    def engine(self) -> SimulatedEngine:
        """What a run copies with, and asks for its memory."""
        return SimulatedEngine(self)

    def reset_peaks(self) -> None:
        self.memory.reset_peaks()

    def empty_cache(self) -> None:
        """What ``torch.cuda.empty_cache`` does on a GPU."""
        self.memory.empty_cache()

    def __enter__(self) -> SimulatedDevice:
        if self._generation is not None:
            self._modes.enter_context(meta_as(self._generation))
        self._modes.enter_context(telling(self.computed))
        self._modes.enter_context(fused_attention())
        self._modes.enter_context(Operations(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._modes.close()

    def claim(self, tensors: Iterable[Tensor], *, placeholder: bool) -> None:
        """Take memory for storages that are not known yet."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._blocks:
                self._blocks[key] = None if placeholder else self.allocate(storage.nbytes())
                self._storages[key] = weakref.ref(storage, functools.partial(self._forget, key))

    def knows(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._blocks

    def takes_memory(self, tensor: Tensor) -> bool:
        return self._blocks.get(tensor.untyped_storage()._cdata) is not None

    def resized(self, tensor: Tensor) -> None:
        """A storage has another size: it takes a new block before it lets go of the old one."""
        storage = tensor.untyped_storage()
        old = self._blocks.get(storage._cdata)
        if old is not None or not self.knows(tensor):
            self.claim([tensor], placeholder=False)
            self._blocks[storage._cdata] = self.allocate(storage.nbytes())
            self.memory.release(old)

    @contextlib.contextmanager
    def scratch(self, nbytes: int) -> Iterator[None]:
        """Memory that is taken for the duration of a copy."""
        block = self.allocate(nbytes)
        try:
            yield
        finally:
            self.memory.release(block)

    def allocate(self, nbytes: int) -> MemoryBlock | None:
        try:
            return self.memory.allocate(nbytes)
        except DeviceFull as full:
            raise torch.cuda.OutOfMemoryError(
                f"simulated GPU out of memory: tried to allocate {nbytes} bytes; {self.allocated} of {full.capacity} "
                f"are allocated, {full.reserved} reserved"
            ) from full

    def computed(self, name: str) -> None:
        """One kernel ran."""
        self.kernel_count += 1
        if self._workspace_bytes and name in _MATRIX_PRODUCTS:
            self.allocate(self._workspace_bytes)
            self._workspace_bytes = 0

    def _forget(self, key: int, _: object) -> None:
        self.memory.release(self._blocks.pop(key))
        del self._storages[key]


class SimulatedEngine(Engine):
    """Copies at once on the ``meta`` device, with the memory of a simulated one."""

    def __init__(self, simulated: SimulatedDevice):
        super().__init__(torch.device("meta"))
        self._simulated = simulated

    def peaks(self) -> Peaks | None:
        return Peaks(allocated=self._simulated.peak_allocated, reserved=self._simulated.peak_reserved)

    def reset_peaks(self) -> None:
        self._simulated.reset_peaks()

    def memory(self) -> Held | None:
        device = self._simulated
        free = 0 if device.memory.capacity is None else device.memory.capacity - device.reserved
        return Held(allocated=device.allocated, reserved=device.reserved, free=free)

    def empty_cache(self) -> None:
        super().empty_cache()
        self._simulated.empty_cache()


__all__ = ["CUBLAS_WORKSPACE_BYTES", "SimulatedDevice", "SimulatedEngine"]
