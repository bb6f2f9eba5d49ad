"""Whether an error says that a device's memory ran out: torch raises its own class for its allocator only.

Everything else that takes memory of the card says so in words of its own. Sources: torch's ``C10_CUDA_CHECK`` and
``C10_CUDA_DRIVER_CHECK`` ("CUDA error: ...", with an ``error_code`` from torch 2.9 on), its checks of cuBLAS, cuDNN and
NCCL, Triton's driver, cuDNN 9's names of its statuses.
"""

from __future__ import annotations

import re

import torch

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
