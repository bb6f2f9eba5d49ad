"""Checks that go wrong in every way, for workers: each stands for a kernel of a card that is not here."""

from __future__ import annotations

import dataclasses
import functools
import os
import time

import torch

from lowvram.selftest import trials
from lowvram.selftest.checks import Check, kernel_check
from lowvram.selftest.results import Result, Subject
from lowvram.selftest.trials import SMALL, Trial
from lowvram.selftest.worker import run_one
from lowvram_kernels.choices import FLOAT32, TORCH, TRITON

OPERATION = "linear_w8a8 int8"


def product(change, sizes, device) -> Trial:
    """The int8 product, with PyTorch's way in place of Triton's, and ``change`` done to what it gives."""
    trial = trials.linear(sizes, device, torch.int8, gelu=False)
    return dataclasses.replace(trial, backends=trial.backends | {TRITON: lambda: change(trial.backends[FLOAT32]())})


def raising(error: Exception):
    def fail(_: object):
        raise error

    return fail


def one_wrong(out):
    out["product"][-1] *= -1
    return out


def one_nan(out):
    out["product"][3, 5] = float("nan")
    return out


CHANGES = {
    "compile error": raising(RuntimeError("CompilationError: at 12:8: out_dtype expected")),
    "launch error": raising(RuntimeError("Triton Error [CUDA]: invalid device image")),
    "out of memory": raising(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")),
    "wrong": one_wrong,
    "nan": one_nan,
    "hang": lambda out: time.sleep(600),
    "death": lambda out: os._exit(134),
    "right": lambda out: out,
}


def checks_of(name: str, device: torch.device) -> list[Check]:
    """Triton's product with that fault, then PyTorch's as it is, then a check of another operation."""
    fault = functools.partial(product, CHANGES[name])
    rows = functools.partial(trials.quantize_rows, dtype=torch.int8)
    return [
        kernel_check(OPERATION, TRITON, SMALL, device, fault),
        kernel_check(OPERATION, FLOAT32, SMALL, device, fault),
        kernel_check("quantize_rows int8", TORCH, SMALL, device, rows),
    ]


def __getattr__(name: str):
    """``fault_<name>``: the function that gives the checks with that fault."""
    fault = name.removeprefix("fault_").replace("_", " ")
    if name.startswith("fault_") and fault in CHANGES:
        return functools.partial(checks_of, fault)
    raise AttributeError(name)


def chatty(device: torch.device) -> list[Check]:
    """One that prints on standard output as libraries do."""

    def run() -> Result:
        print("not a line of ours")
        os.write(1, b"nor this\n")
        return Result(subject=Subject(name="chatty"), status="passed")

    return [Check(subject=Subject(name="chatty"), run=run)]


def unbegun(device: torch.device) -> list[Check]:
    raise RuntimeError("no kernel image is available")


def failing() -> Result:
    raise RuntimeError("an illegal memory access was encountered")


def passing(name: str) -> Result:
    return Result(subject=Subject(name=name), status="passed")


def two(device: torch.device) -> list[Check]:
    """One that fails and one that does not."""
    second = functools.partial(passing, "second")
    return [Check(subject=Subject(name="first"), run=failing), Check(subject=Subject(name="second"), run=second)]


def outcome(check: Check) -> Result:
    """What a worker would say of it."""
    return run_one(check)
