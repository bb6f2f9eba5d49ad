"""Identity that results depend on: card, driver, versions and the kernels' own text."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import platform
from importlib.metadata import version
from pathlib import Path

import torch

import lowvram_kernels
from lowvram.planning.measure import driver_version
from lowvram_kernels.chips import has_triton, triton_wanted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """Of a device as results hold for it. A processor has no driver and no capability."""

    device: str
    capability: str
    driver: str
    torch: str
    triton: str
    lowvram: str
    kernels: str

    @property
    def key(self) -> str:
        return " | ".join(f"{name} {value}" for name, value in dataclasses.asdict(self).items())


def identity_of(device: torch.device) -> Identity:
    cuda = device.type == "cuda"
    return Identity(
        device=torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        capability=".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else "none",
        driver=driver_version() if cuda else "none",
        torch=torch.__version__,
        # Switched off, its kernels are not examined: what is known then says nothing of runs with them.
        triton=str(importlib.import_module("triton").__version__) if has_triton() and triton_wanted() else "none",
        lowvram=version("lowvram"),
        kernels=kernels_digest(),
    )


@functools.cache
def kernels_digest() -> str:
    """Of the sources of all kernels: 12 characters that change with any of them."""
    digest = hashlib.sha256()
    for folder in lowvram_kernels.__path__:
        for file in sorted(Path(folder).glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
