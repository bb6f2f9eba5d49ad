"""All checks of one device, in other processes, and what is known of it afterwards.

What is measured of it and judged by no bound is read by plans.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from lowvram.planning.library_memory import OutsideAllocator, measure_outside_allocator
from lowvram.planning.measure import CudaRunner
from lowvram.selftest.isolated import BEGIN_S, CHECK_S, Heard, run_isolated
from lowvram.selftest.results import Result, Subject, judge
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


SOURCES = ("lowvram.selftest.checks:kernel_checks", "lowvram.selftest.streaming:moving_checks")
"""Where workers find the checks. What failed in the first is not used in the second."""
_START = "start of "
Measure = Callable[[torch.device], Result]


def examine(
    device: torch.device,
    *,
    known: Sequence[Result] = (),
    heard: Heard = lambda result: None,
    sources: Sequence[str] = SOURCES,
    measures: Sequence[Measure] | None = None,
    check_s: float = CHECK_S,
    limit_s: float = float("inf"),
) -> tuple[list[Result], bool]:
    """(``known`` and the results of all other checks, whether all were, within ``limit_s``).

    ``measures`` come behind the checks; by default what lies outside of torch's allocator, on CUDA. A source whose
    process does not even begin becomes one failed result.
    """
    until = time.monotonic() + limit_s
    results = [result for result in known if not result.subject.name.startswith(_START)]
    begun = True
    for source in sources:
        off = [(one.operation, one.backend) for one in judge(results).off]
        names = [result.subject.name for result in results]
        try:
            results += run_isolated(
                source, device, known=names, off=off, heard=heard, check_s=check_s, begin_s=BEGIN_S, until=until
            )
        except DeviceError as error:
            subject, begun = Subject(name=_START + source.rpartition(":")[2].replace("_", " ")), False
            results.append(Result(subject=subject, status="failed", message=str(error)))
            heard(results[-1])
    if measures is None:
        measures = (outside_bytes,) if device.type == "cuda" else ()
    for measure in measures:
        if time.monotonic() < until:
            results.append(measure(device))
            heard(results[-1])
    return results, begun and time.monotonic() < until
