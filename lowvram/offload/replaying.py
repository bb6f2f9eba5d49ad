"""Which cards were seen to replay layers as CUDA graphs with the same bits: by a selftest, now or by what it kept."""

from __future__ import annotations

import torch

_trusted: set[str] = set()


def trust(device: torch.device) -> None:
    """From now on layers may be replayed there without being asked for; see ``PlanOptions.cuda_graphs``."""
    _trusted.add(str(device))


def trusted(device: torch.device) -> bool:
    """Whether that card was seen to; "cuda" without an index stands for every one."""
    return str(device) in _trusted or device.type in _trusted


def reset() -> None:
    """Trust no card."""
    _trusted.clear()
