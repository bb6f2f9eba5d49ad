"""``lowvram selftest``: examine anew, keep what was found, say it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from lowvram.devices import choose_device
from lowvram.selftest import cache
from lowvram.selftest.cache import identity_of
from lowvram.selftest.examine import SOURCES, examine
from lowvram.selftest.report import Examined
from lowvram.selftest.results import Result
from lowvram_kernels.errors import OutputError

log = logging.getLogger(__name__)
NO_GPU = "no CUDA device is here: the processor's half is examined, and nothing is said of any GPU"


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


def write_text(path: Path, text: str) -> None:
    """Raises: OutputError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error}; choose another place") from error
