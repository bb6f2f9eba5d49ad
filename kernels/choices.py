"""Choice of the kernel that serves an operation on a device: an order of preference, and what was learnt since.

Every dispatcher asks ``choose``. A kernel that failed on a card is switched off there, for that one operation; another
one is preferred where it was found to be faster. Both hold for the process, and ``noted`` lists them for the run's
report. The last backend of an operation is plain PyTorch, or the operation's parts; it is what the others are measured
against, and stays. Other libraries' kernels race ours: they are no backends of an operation until one is preferred.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Iterator
from typing import Literal

import torch

from lowvram_kernels import cpu_products
from lowvram_kernels.chips import counts_as_cuda, has_fp8_units, triton_serves
from lowvram_kernels.cpu_products import FLOAT32, INT_MM, SCALED_MM
from lowvram_kernels.errors import DeviceError
from lowvram_kernels.libraries import COMFY, CUDNN, SAGE, TORCHAO, installed

TRITON, TORCH, ONE_BY_ONE = "triton", "torch", "one by one"

log = logging.getLogger(__name__)

# The kinds of rows that a kernel is compiled for: in 8 bit, in 8 bit after a rotation, in wider floating point.
INT8, ROTATED, FP8, WIDE = "int8", "int8 rotated", "fp8", "wide"

# The backends of each operation, the preferred one first. ``ONE_BY_ONE`` stands for the parts of an operation, each of
# which has backends of its own. Only the Triton kernels fuse GELU, so that they come first where it follows an fp8
# product, and after ``torch._scaled_mm`` where it does not. On a CPU the products are tried out before one is chosen:
# see ``cpu_products``.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "linear_w8a8 int8": (TRITON, INT_MM, FLOAT32),
    "linear_w8a8 int8 gelu": (TRITON, INT_MM, FLOAT32),
    "linears_w8a8 int8": (TRITON, ONE_BY_ONE),
    "linear_w8a8 fp8": (SCALED_MM, TRITON, FLOAT32),
    "linear_w8a8 fp8 gelu": (TRITON, SCALED_MM, FLOAT32),
    **{f"quantize_rows {kind}": (TRITON, TORCH) for kind in (INT8, ROTATED, FP8)},
    **{f"norm_rows {kind}": (TRITON, TORCH) for kind in (INT8, ROTATED, FP8, WIDE)},
    **{f"add_gated_norm_rows {kind}": (TRITON, TORCH) for kind in (INT8, ROTATED, FP8, WIDE)},
    "add_gated": (TRITON, TORCH),
    "channel_norm_silu": (TRITON, TORCH),
    "norm_rope": (TRITON, TORCH),
    "attend_projected": (TRITON, ONE_BY_ONE),
    "encode_kv": (TRITON, TORCH),
    "rotate_keys": (TRITON, TORCH),
    "ring_attention": (TRITON, TORCH),
    "attention": (TORCH,),
    "conv": (TORCH,),
}

# What runs an operation on CUDA only where it was found to be right and faster, and is installed.
RIVALS: dict[str, tuple[str, ...]] = {
    "linear_w8a8 int8": (TORCHAO, COMFY),
    "linear_w8a8 int8 gelu": (TORCHAO, COMFY),
    "attention": (CUDNN, SAGE, COMFY),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Note:
    """That a backend of an operation is off, or preferred, on a device, and why. ``device`` without an index ("cuda")
    stands for every device of that type."""

    operation: str
    backend: str
    device: str
    verdict: Literal["off", "preferred"]
    reason: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.backend} is {self.verdict} on {self.device}: {self.reason}"


# By operation, backend and device for what is off; by operation and device for what is preferred. The choices made
# from them are dropped as a whole, by taking a new dictionary, so that a thread that decides meanwhile cannot put an
# old answer into the new one.
_off: dict[tuple[str, str, str], Note] = {}
_preferred: dict[tuple[str, str], Note] = {}
_chosen: dict[tuple[str, torch.device], str] = {}
_lock = threading.RLock()


def choose(operation: str, device: torch.device) -> str:
    """The backend to run; decided once an (operation, device), afterwards one look into a dictionary.

    Raises:
        ValueError: no such operation.
        ConfigError: LOWVRAM_TRITON is neither 0 nor 1.
        DeviceError: nothing is left that could run it there.
    """
    try:
        return _chosen[operation, device]
    except KeyError:
        return _decide(operation, device)


def backends(operation: str, device: torch.device) -> tuple[str, ...]:
    """Those that serve the device and are not off there, the one that runs first; of rivals those that are preferred.

    Raises: as ``choose``.
    """
    order = [name for name in _known(operation) if _serves(name, operation, device)]
    racing = rivals(operation, device)
    if device.type == "cpu" and operation.startswith("linear_w8a8"):
        _note_findings(operation, device)
    with _lock:
        wanted = [note.backend for name in _names(device) if (note := _preferred.get((operation, name)))]
        return tuple(
            name
            for name in dict.fromkeys([*(name for name in wanted if name in order or name in racing), *order])
            if not any((operation, name, where) in _off for where in _names(device))
        )


def rivals(operation: str, device: torch.device) -> tuple[str, ...]:
    """Other libraries' kernels that are there for an operation, whether or not they are right or fast."""
    every = RIVALS.get(operation, ()) if counts_as_cuda(device) else ()
    return tuple(name for name in every if installed(name))


def switch_off(operation: str, backend: str, device: torch.device, reason: str) -> None:
    """From now on ``backend`` does not run ``operation`` on ``device`` (without an index: on all of its type).

    Raises:
        ValueError: no such operation, no such backend of it, or it is the PyTorch version, which stays.
    """
    _check(operation, backend)
    if backend == _known(operation)[-1]:
        raise ValueError(f"{backend!r} of {operation!r} is its reference, which cannot be switched off")
    note = Note(operation=operation, backend=backend, device=str(device), verdict="off", reason=reason)
    with _lock:
        _off[operation, backend, note.device] = note
        forget_choices()


def prefer(operation: str, backend: str, device: torch.device, reason: str) -> None:
    """From now on ``backend`` is the first that ``operation`` takes on ``device``, unless it is off.

    Raises:
        ValueError: no such operation, no such backend of it, or one that does not serve the device.
    """
    _check(operation, backend)
    if not (
        backend in rivals(operation, device) or (backend in _known(operation) and _serves(backend, operation, device))
    ):
        raise ValueError(f"{backend!r} of {operation!r} was to be preferred on {device}, which it does not serve")
    note = Note(operation=operation, backend=backend, device=str(device), verdict="preferred", reason=reason)
    with _lock:
        _preferred[operation, note.device] = note
        forget_choices()


def noted() -> tuple[Note, ...]:
    """What is off or preferred, and why, by operation."""
    with _lock:
        notes = [*_off.values(), *_preferred.values()]
    return tuple(sorted(notes, key=lambda note: (note.operation, note.device, note.verdict, note.backend)))


def forget_choices() -> None:
    """Decide anew from the next ``choose`` on; what is off or preferred stays so."""
    global _chosen
    _chosen = {}


def reset() -> None:
    """Forget all that was switched off or preferred, and read LOWVRAM_TRITON anew."""
    with _lock:
        _off.clear()
        _preferred.clear()
        forget_choices()


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """What is changed inside is set back at the end."""
    with _lock:
        off, preferred = dict(_off), dict(_preferred)
        forget_choices()
    try:
        yield
    finally:
        with _lock:
            reset()
            _off.update(off)
            _preferred.update(preferred)


@functools.cache
def rows_operation(name: str, dtype: torch.dtype, group: int = 1) -> str:
    """The operation ``name`` for rows of that dtype, rotated in groups or (1) not."""
    if dtype is torch.int8:
        return f"{name} {ROTATED if group > 1 else INT8}"
    return f"{name} {FP8 if dtype is torch.float8_e4m3fn else WIDE}"


def _decide(operation: str, device: torch.device) -> str:
    chosen = _chosen
    able = backends(operation, device)
    if not able:
        raise DeviceError(
            f"nothing is left that could run {operation!r} on {device}: of {', '.join(_known(operation))} all are off "
            "or do not serve it"
        )
    chosen[operation, device] = able[0]
    return able[0]


def _note_findings(operation: str, device: torch.device) -> None:
    """What the processor's products were found to be, where nobody said otherwise."""
    found = cpu_products.findings(torch.float8_e4m3fn if FP8 in operation else torch.int8)
    for backend, why in found.wrong.items():
        _say_once(f"{backend} is not used: {why}; {found.preferred} runs instead")
    with _lock:
        for backend, why in found.wrong.items():
            note = Note(operation=operation, backend=backend, device=str(device), verdict="off", reason=why)
            _off.setdefault((operation, backend, note.device), note)
        preferred = Note(
            operation=operation, backend=found.preferred, device=str(device), verdict="preferred", reason=found.reason
        )
        _preferred.setdefault((operation, preferred.device), preferred)


def _known(operation: str) -> tuple[str, ...]:
    if operation not in OPERATIONS:
        raise ValueError(f"no operation is called {operation!r}; known are {', '.join(OPERATIONS)}")
    return OPERATIONS[operation]


def _check(operation: str, backend: str) -> None:
    every = (*_known(operation), *RIVALS.get(operation, ()))
    if backend not in every:
        raise ValueError(f"{operation!r} has no backend {backend!r}; it has {', '.join(every)}")


def _serves(backend: str, operation: str, device: torch.device) -> bool:
    if backend == TRITON:
        return triton_serves(device) and (FP8 not in operation or has_fp8_units(device))
    return backend != SCALED_MM or has_fp8_units(device)


def _names(device: torch.device) -> tuple[str, ...]:
    """What notes for this device may be filed under; the narrower first."""
    return (str(device),) if device.index is None else (str(device), device.type)


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)
