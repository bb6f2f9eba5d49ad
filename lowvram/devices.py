"""Names of devices and dtypes, as options give them; what holds while a device computes; and when its memory ran out.

torch raises its own class of that for its allocator only. Everything else that takes memory of the card says so in
words of its own. Sources: torch's ``C10_CUDA_CHECK`` and ``C10_CUDA_DRIVER_CHECK`` ("CUDA error: ...", with an
``error_code`` from torch 2.9 on), its checks of cuBLAS, cuDNN and NCCL, Triton's driver, cuDNN 9's names of its
statuses.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

import torch

from lowvram.precision import exact_float32
from lowvram_kernels.errors import ConfigError, HardwareError

T = TypeVar("T")
log = logging.getLogger(__name__)

_MEMORY_ALLOCATION = 2
"""``cudaErrorMemoryAllocation``, and the driver's ``CUDA_ERROR_OUT_OF_MEMORY``."""

_SAID = re.compile(
    r"CUDA (driver )?error: (out of memory|CUDA_ERROR_OUT_OF_MEMORY)"
    r"|Triton Error \[CUDA\]: out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_(ALLOC_FAILED|INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED)"
)
# NCCL's error is a general one; what CUDA told it stands behind "Last error:".
_NCCL = re.compile(r"NCCL.*Cuda failure (2 )?'out of memory'", re.DOTALL)
# Where no way to compute a convolution works, torch does not say why: for lack of room for a workspace, or because
# cuDNN has none for this card.
_NO_ENGINE = "unable to find an engine to execute this computation"


def is_out_of_memory(error: BaseException, *, refused: bool = False) -> bool:
    """``refused``: torch's allocator has refused memory in the work that failed (see ``allocator_refusals``), which is
    what tells a convolution that found no room from one that no engine can compute."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if isinstance(error, torch.AcceleratorError) and getattr(error, "error_code", None) == _MEMORY_ALLOCATION:
        return True
    said = str(error)
    return bool(_SAID.search(said) or _NCCL.search(said)) or (refused and _NO_ENGINE in said)


def allocator_refusals() -> int:
    """How often torch's allocator has refused memory of the current device so far, those times included that a library
    took for an answer and tried something smaller."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return 0
    return int(torch.cuda.memory_stats().get("num_ooms", 0))


def choose_device(name: str) -> torch.device:
    """ "auto" is a GPU where there is one that can be used, else the CPU; where a GPU can not be used, that is said.

    Raises:
        HardwareError: a device that is not there, or that the driver does not serve.
    """
    if name == "auto":
        name = "cuda" if cuda_is_here() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise HardwareError(f"--device is {name!r}; expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise HardwareError(f"--device is {name!r}; expected auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if (reason := _why_not_cuda()) is not None:
        raise HardwareError(f"--device is {name!r}, but {reason}; `lowvram doctor` says more")
    if (device.index or 0) >= torch.cuda.device_count():
        raise HardwareError(f"--device is {name!r}, but {torch.cuda.device_count()} CUDA devices are here{_hidden()}")
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def cuda_is_here() -> bool:
    """Whether there is a GPU that can be used. Where there is one that cannot, why is said, once for each reason."""
    reason = _why_not_cuda()
    if reason is not None and torch.backends.cuda.is_built() and "no NVIDIA driver" not in reason:
        _say(f"no GPU is used: {reason}; `lowvram doctor` says more")
    return reason is None


def _why_not_cuda() -> str | None:
    """None where CUDA works."""
    try:
        if torch.cuda.is_available():
            return None
        if not torch.backends.cuda.is_built():
            return "this PyTorch is one without CUDA"
        torch.cuda.init()  # it fails, and says why
    # AssertionError: a library of CUDA's is missing. The others come from the driver, in many words.
    except (RuntimeError, AssertionError, OSError) as error:
        text = " ".join(str(error).split())
        if "no NVIDIA driver" in text:
            return "no NVIDIA driver is here"
        return f"CUDA cannot be started ({text[:300]}){_hidden()}"
    return f"no CUDA device is here{_hidden()}"


def _hidden() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"


_said: set[str] = set()


def _say(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.warning("%s", message)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype of everything that is not 8-bit: bfloat16 on GPUs; float32 on CPUs, most of which compute bf16 slower."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise ConfigError(f"--dtype is {name!r}; expected auto, float32 or bfloat16")
    return known[name]


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Let a GPU be this thread's current one: Triton launches there, whatever device its tensors are on, and libraries
    put their contexts and pinned memory there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """What holds while a run computes, and not behind it: its device is the current one, and float32 is float32."""
    with current(device), exact_float32():
        yield


def each_within(
    context: Callable[[], contextlib.AbstractContextManager[object]], steps: Iterator[T]
) -> Generator[T, None, None]:
    """Yield what ``steps`` yields. Every step runs within a ``context`` of its own, and whoever takes what it gave does
    not: several such iterators can be taken from in turn."""
    try:
        while True:
            with context():
                try:
                    step = next(steps)
                except StopIteration:
                    return
            yield step
    finally:
        close = getattr(steps, "close", None)
        if close is not None:
            with context():
                close()
