"""All checks of a device, in their order, each of which can be run by itself."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator

import torch

from lowvram.selftest import ring_trials, trials
from lowvram.selftest.results import Result, Subject
from lowvram.selftest.trials import FULL, SMALL, Sizes, Trial, beside_finite, worst
from lowvram_kernels.chips import has_fp8_units
from lowvram_kernels.choices import FP8, INT8, OPERATIONS, ROTATED, TRITON, WIDE, backends, rivals
from lowvram_kernels.rotation import GROUP, SYLVESTER

Make = Callable[[Sizes, torch.device], Trial]  # the operation on random operands
REPEATS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """``run`` raises whatever the check meets; what is raised becomes a failure of this check alone."""

    subject: Subject
    run: Callable[[], Result]


def makers() -> Iterator[tuple[str, Make]]:
    """Operations of ``choices`` and their trials. An operation may come twice, at other settings, which are named by
    what its trial is given."""
    part = functools.partial
    for dtype, name in ((torch.int8, INT8), (torch.float8_e4m3fn, FP8), (torch.bfloat16, WIDE)):
        if name != WIDE:
            yield f"quantize_rows {name}", part(trials.quantize_rows, dtype=dtype)
            yield f"linear_w8a8 {name}", part(trials.linear, dtype=dtype, gelu=False)
            yield f"linear_w8a8 {name} gelu", part(trials.linear, dtype=dtype, gelu=True)
        yield f"add_gated_norm_rows {name}", part(trials.fused_norm, dtype=dtype)
        yield f"norm_rows {name}", part(trials.fused_norm, dtype=dtype, gated=False)
    yield f"linears_w8a8 {INT8}", trials.linears
    for group in (SYLVESTER, GROUP):  # of artifacts of format version 2, and of what convert makes
        yield f"quantize_rows {ROTATED}", part(trials.quantize_rows, dtype=torch.int8, most=group)
    # As calibrated artifacts have it where no norm is in front.
    yield f"quantize_rows {ROTATED}", part(trials.quantize_rows, dtype=torch.int8, most=GROUP, smooth=True)
    yield f"add_gated_norm_rows {ROTATED}", part(trials.fused_norm, dtype=torch.int8, most=GROUP)
    yield f"norm_rows {ROTATED}", part(trials.fused_norm, dtype=torch.int8, gated=False, most=GROUP)
    yield "add_gated", part(trials.fused_norm, dtype=None)
    yield "channel_norm_silu", trials.channel_norm_silu
    yield "norm_rope", ring_trials.norm_rope
    yield "encode_kv", ring_trials.encode_kv
    yield "rotate_keys", ring_trials.rotate_keys
    yield "ring_attention", ring_trials.ring_attention
    yield "attend_projected", ring_trials.attend_projected
    yield "attention", ring_trials.attention


def kernel_checks(device: torch.device) -> Iterator[Check]:
    """Small shapes first, so that what does not even compile is known soon; those of the 14B on a GPU only."""
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    for sizes in (SMALL, FULL) if device.type == "cuda" else (SMALL,):
        for operation, make in makers():
            serving = backends(operation, device)
            # Interpreted kernels are no choice that a run has: they are checked so that the checks are.
            interpretable = interpreted and TRITON in OPERATIONS[operation]
            for backend in (TRITON, *serving) if interpretable else serving:
                if FP8 not in operation or has_fp8_units(device):  # without the units no rows are quantized to fp8
                    yield kernel_check(operation, backend, sizes, device, make)
            for rival in rivals(operation, device):
                if rival not in serving:
                    yield kernel_check(operation, rival, sizes, device, make)


def kernel_check(operation: str, backend: str, sizes: Sizes, device: torch.device, make: Make) -> Check:
    """One backend against the operation's reference."""
    settings = getattr(make, "keywords", {})
    most, smooth = settings.get("most"), settings.get("smooth")
    told = f"{operation}{f' by {most}' if most else ''}{' smoothed' if smooth else ''}"
    name = f"{told}: {backend}, {sizes.name}"
    subject = Subject(name=name, operation=operation, backend=backend, size=sizes.name)

    def run() -> Result:
        torch.manual_seed(0)
        trial = make(sizes, device)
        work = trial.backends[backend]
        out = work()
        if wrong := beside_finite(out):
            return Result(subject=subject, status="failed", message=f"{wrong}; the reference has none")
        what, measured = worst(trial.judge(out))
        del out
        message = (
            ""
            if measured.right
            else f"{what} is off by {measured.error:.3g}, expected at most {measured.bound:.3g}: it computes wrongly"
        )
        return Result(
            subject=subject,
            status="passed" if measured.right else "failed",
            message=message,
            error=measured.error,
            bound=measured.bound,
            seconds=seconds_of(work, device) if measured.right else None,
        )

    return Check(subject=subject, run=run)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The best of several calls, the first of which has been made already."""
    return min(_seconds(work, device) for _ in range(REPEATS))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
