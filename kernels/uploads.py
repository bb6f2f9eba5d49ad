"""Small tensors from the host to the device without letting the host wait for what the device still has to do."""

from __future__ import annotations

import functools
import logging

import torch

Tensor = torch.Tensor
log = logging.getLogger(__name__)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, in stream order; what is there already comes back as it is.

    A plain ``.to(device)`` copies from pageable memory and waits until the copy is done, and so for all that was asked
    of the device before it. From pinned memory (torch's cache of it, which keeps a buffer until its copy is done) the
    copy is queued like a kernel.
    """
    if not waits(device) or tensor.device.type != "cpu":
        return tensor.to(device)
    return pinned(tensor).to(device, non_blocking=True)


def waits(device: torch.device) -> bool:
    """Whether plain copies to the device would let the host wait."""
    return device.type == "cuda"


def pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned memory; the tensor itself, and a warning once, where none is to be had."""
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        _say_once(str(error).partition("\n")[0])
        return tensor


@functools.cache
def _say_once(reason: str) -> None:
    log.warning("no pinned memory for small copies (%s): the host waits for each of them", reason)
