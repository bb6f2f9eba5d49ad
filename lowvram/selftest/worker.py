"""One process that runs checks and says so, line by line: ``python -m lowvram.selftest.worker``.

A kernel that fails may leave the CUDA context unusable, end the process or never return. Here that costs one check: the
process that listens begins another worker with what is left (see ``isolated``).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

import torch

from lowvram.devices import is_out_of_memory
from lowvram.selftest.checks import Check
from lowvram.selftest.results import Result


def run_one(check: Check) -> Result:
    """A check's result, whatever it raises; a lack of memory is no fault of what was checked."""
    try:
        return check.run()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        short = isinstance(error, MemoryError) or is_out_of_memory(error)
        return Result(subject=check.subject, status="skipped" if short else "failed", message=said)


def usable(device: torch.device) -> bool:
    """Whether the device still answers: an illegal access makes every later call fail."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except Exception:  # whatever the driver says
        return False
    return True


def work(checks: Iterable[Check], skip: frozenset[str], device: torch.device, out: TextIO) -> None:
    """Run what is not to be skipped; ends early where the device no longer answers."""

    def say(**line: Any) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    found = [check for check in checks if check.subject.name not in skip]
    for check in found:
        say(begin=check.subject.__dict__)
        result = run_one(check)
        say(result=result.to_json())
        if result.status == "failed" and not usable(device):
            return
    say(done=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checks", help="module:function that gives the checks of a device")
    parser.add_argument("device")
    options = parser.parse_args()
    told = json.load(sys.stdin)
    # What libraries print belongs to the log: lines of our own go where standard output was.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for operation, backend in told["off"]:
        switch_off_here(operation, backend, device)
    module, _, function = options.checks.partition(":")
    checks = getattr(importlib.import_module(module), function)(device)
    work(checks, frozenset(told["skip"]), device, out)


def switch_off_here(operation: str, backend: str, device: torch.device) -> None:
    from lowvram_kernels.choices import switch_off

    switch_off(operation, backend, device, "it failed before")


if __name__ == "__main__":
    main()
