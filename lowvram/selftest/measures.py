"""What is measured of a card and judged by no bound: plans read it."""

from __future__ import annotations

import torch

from lowvram.planning.library_memory import OutsideAllocator, measure_outside_allocator
from lowvram.planning.measure import CudaRunner
from lowvram.selftest.results import Result, Subject
from lowvram_kernels.errors import DeviceError


def outside_bytes(device: torch.device) -> Result:
    """What lies outside of torch's allocator, measured in a process of its own and kept with the card's rates."""
    subject = Subject(name="bytes outside of torch's allocator")
    try:
        found = measure_outside_allocator(device, CudaRunner(device).key)
    except DeviceError as error:  # plans then reserve what they reserve unmeasured
        return Result(subject=subject, status="skipped", message=str(error))
    return Result(subject=subject, status="passed", figures=figures_of(found))


def figures_of(found: OutsideAllocator) -> dict[str, float]:
    """Bytes by part; the VAE's by pixels of a frame."""
    figures = {f"{name}_bytes": float(getattr(found, name)) for name in ("context", "cublas", "modules")}
    return figures | {f"vae_{pixels}px_bytes": float(nbytes) for pixels, nbytes in found.vae}
