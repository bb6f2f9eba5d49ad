"""Runs checks in other processes, so that a check which crashes or hangs costs itself alone."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from typing import IO, Any

import torch

from lowvram.selftest.results import Result, Subject
from lowvram_kernels.errors import DeviceError

# A kernel of the 14B compiles in seconds; slow disks and processors have their time.
CHECK_S = 180.0
BEGIN_S = 300.0
_TAIL = 400
Heard = Callable[[Result], object]


def run_isolated(
    checks: str,
    device: torch.device,
    *,
    known: Collection[str] = (),
    off: Collection[tuple[str, str]] = (),
    heard: Heard = lambda result: None,
    check_s: float = CHECK_S,
    begin_s: float = BEGIN_S,
    until: float = float("inf"),
) -> list[Result]:
    """Results of all checks that ``checks`` ("module:function") gives for the device, but for those ``known`` by name.

    ``off`` are (operation, backend) that the checks go without; ``heard`` is told each result; a check may take
    ``check_s`` seconds. After ``until`` (of ``time.monotonic``) nothing more is awaited: what was not examined is left
    out.

    Raises:
        DeviceError: a worker ended before its first check, or between two.
    """
    results: list[Result] = []
    while True:
        told = {"skip": [*known, *(result.subject.name for result in results)], "off": [list(pair) for pair in off]}
        found, finished = _one_worker([checks, str(device)], told, heard, (begin_s, check_s), until)
        results += found
        if finished or time.monotonic() >= until:
            return results


def _one_worker(
    arguments: list[str], told: dict[str, Any], heard: Heard, seconds: tuple[float, float], until: float
) -> tuple[list[Result], bool]:
    """(results, whether nothing is left). A worker that ends early, or is ended, leaves a failed result behind."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "lowvram.selftest.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            # Where this process found its modules, the worker finds them.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            lines = _lines_of(process.stdout)
            process.stdin.write(json.dumps(told).encode())
            process.stdin.close()
            results, begun, why = _listen(lines, heard, seconds, until)
        except BrokenPipeError:
            results, begun, why = [], None, "ended"
        finally:
            process.kill()
            code = process.wait()
        if why in ("done", "late"):
            return results, why == "done"
        if begun is None:
            if results and results[-1].status == "failed":  # its context was lost, and it said so by ending
                return results, False
            said = _tail(errors)
            raise DeviceError(f"the process that examines {arguments[-1]} {why} before a check (code {code}): {said}")
        if why == "ended":
            why = f"the process ended with code {code} in it: {_tail(errors)}"
        failed = Result(subject=begun, status="failed", message=why)
        heard(failed)
        return [*results, failed], False


def _listen(
    lines: queue.Queue[dict[str, Any] | None], heard: Heard, seconds: tuple[float, float], until: float
) -> tuple[list[Result], Subject | None, str]:
    """(results, the check that was under way, why nothing more came)."""
    results: list[Result] = []
    begun: Subject | None = None
    wait = seconds[0]
    while True:
        left = until - time.monotonic()
        try:
            line = lines.get(timeout=max(0.0, min(wait, left)))
        except queue.Empty:
            return results, begun, "late" if left <= wait else f"it did not come to an end within {wait:.0f} s"
        if line is None:
            return results, begun, "ended"
        if "done" in line:
            return results, None, "done"
        if "begin" in line:
            begun, wait = Subject(**line["begin"]), seconds[1]
        elif "result" in line:
            results.append(Result.from_json(line["result"]))
            heard(results[-1])
            begun = None


def _lines_of(stream: IO[bytes]) -> queue.Queue[dict[str, Any] | None]:
    """Lines as they come, None at the end; read by a thread, because a pipe has no timeout everywhere."""
    lines: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        with stream:
            for line in stream:
                lines.put(json.loads(line))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _tail(errors: IO[bytes]) -> str:
    errors.seek(0)
    text = " ".join(errors.read().decode(errors="replace").split())
    return text[-_TAIL:] or "it said nothing"
