"""First run on a card: what is known of it is read, or examined where nothing is."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from lowvram.selftest import cache
from lowvram.selftest.cache import Identity, identity_of
from lowvram.selftest.examine import examine
from lowvram.selftest.results import Result, Verdict, judge
from lowvram_kernels.errors import ConfigError

log = logging.getLogger("lowvram.plan")  # said before a run starts, as the plan is
SWITCH = "LOWVRAM_SELFTEST"
CHECK_S, LIMIT_S = 60.0, 180.0
Examine = Callable[[torch.device, list[Result]], tuple[list[Result], bool]]


def wanted() -> bool:
    """Raises: ConfigError where LOWVRAM_SELFTEST is neither 0 nor 1."""
    value = os.environ.get(SWITCH) or "1"
    if value not in ("0", "1"):
        raise ConfigError(f"{SWITCH} is {value!r}; expected 0 (cards are not examined) or 1, which is the default")
    return value == "1"


def _examine(device: torch.device, known: list[Result]) -> tuple[list[Result], bool]:
    return examine(device, known=known, check_s=CHECK_S, limit_s=LIMIT_S)


def get_ready(
    device: torch.device,
    *,
    file: Path | None = None,
    identify: Callable[[torch.device], Identity] = identity_of,
    examine_card: Examine = _examine,
) -> Verdict | None:
    """Let this process go by what is known of a CUDA card; examine it first where that is nothing, or not all.

    None for a device that is not CUDA, and where LOWVRAM_SELFTEST=0. Of processes that come at once, one examines and
    the others wait and read.
    """
    if device.type != "cuda" or not wanted():
        return None
    file, key = file or cache.cache_file(), identify(device).key
    with cache.alone(file):
        every = cache.read(file)
        known = every.get(key, cache.Known())
        if not known.complete:
            known = _examined(device, known, examine_card)
            cache.write(file, every | {key: known})
    verdict = judge(known.results)
    verdict.apply(device)
    return verdict


def _examined(device: torch.device, known: cache.Known, examine_card: Examine) -> cache.Known:
    log.info(
        "%s was not examined yet with this driver, torch and triton: its kernels and copies are checked once, for %.0f "
        "s at most (--no-selftest goes without; `lowvram selftest` says all)",
        device,
        LIMIT_S,
    )
    results, complete = examine_card(device, list(known.results))
    if not complete:
        log.warning("%s: time ran out after %d checks; the next run goes on with the others", device, len(results))
    return cache.Known(results=tuple(results), complete=complete)
