"""All checks of one device, in other processes, and what is known of it afterwards.

What is measured of it and judged by no bound is read by plans.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lowvram.devices import choose_device
from lowvram.planning.library_memory import OutsideAllocator, measure_outside_allocator
from lowvram.planning.measure import CudaRunner
from lowvram.planning.timed import keep_timed
from lowvram.selftest import cache
from lowvram.selftest.cache import identity_of
from lowvram.selftest.isolated import BEGIN_S, CHECK_S, Heard, run_isolated
from lowvram.selftest.report import Examined
from lowvram.selftest.results import Result, Subject, judge
from lowvram.selftest.timings import operation_rates
from lowvram_kernels.errors import DeviceError

log = logging.getLogger(__name__)


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
NO_GPU = "no CUDA device is here: the processor's half is examined, and nothing is said of any GPU"
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
    if device.type == "cuda":
        keep_timed(CudaRunner(device).key, operation_rates(results))
    return results, begun and time.monotonic() < until


def selftest(
    device: str = "auto", *, file: Path | None = None, sources: tuple[str, ...] | None = None
) -> tuple[list[Examined], str]:
    """Examine a GPU and the processor, or the processor alone: (each, what is to be said beside).

    Raises:
        HardwareError: a device that is not there.
    """
    chosen = choose_device(device)
    devices = [chosen] if chosen.type == "cpu" else [chosen, torch.device("cpu")]
    note = NO_GPU if not torch.cuda.is_available() else ""
    return [_examined(one, file or cache.cache_file(), sources or SOURCES) for one in devices], note


def _examined(device: torch.device, file: Path, sources: tuple[str, ...]) -> Examined:
    def said(result: Result) -> None:
        if result.status != "passed":
            log.warning("%s: %s %s: %s", device, result.subject.name, result.status, result.message)

    identity = identity_of(device)
    results, complete = examine(device, heard=said, sources=sources)
    with cache.alone(file):
        found = cache.Known(results=tuple(results), complete=complete)
        cache.write(file, cache.read(file) | {identity.key: found})
    return Examined(device=device, identity=identity, results=results)
