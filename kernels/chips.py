"""Chips: which one a tensor is on, and whether Triton kernels can serve it there.

Generations are compute capabilities without the dot: 80 (A100), 86 (RTX 30), 89 (RTX 40), 90 (H100, H200), 120
(RTX 50). Everything that is not CUDA is generation 0 and runs the PyTorch versions; ``meta`` is one of these, unless it
stands for a GPU (``stand_ins.meta_as``).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

from lowvram_kernels.errors import ConfigError

log = logging.getLogger(__name__)

GENERATIONS = (80, 86, 89, 90, 120)

# Set to 0 it keeps every Triton kernel from running, where one fails on a new GPU or under a new driver.
SWITCH = "LOWVRAM_TRITON"

# Bytes of shared memory that one thread block can have; CUDA C++ programming guide, technical specifications.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}


# The generation that ``meta`` stands for, None for none; ``stand_ins.meta_as`` sets it.
_meta_generation: int | None = None


def counts_as_cuda(device: torch.device) -> bool:
    """Whether the code for CUDA runs there: on CUDA, and on ``meta`` while it stands for a GPU."""
    return device.type == "cuda" or (device.type == "meta" and _meta_generation is not None)


def generation(device: torch.device) -> int:
    """Compute capability as one number (8.9 is 89) of a CUDA device, or of the GPU that ``meta`` stands for; 0 for any
    other device."""
    if device.type == "meta":
        return _meta_generation or 0
    return _capability(device) if device.type == "cuda" else 0


def name_of(device: torch.device) -> str:
    """The card's name of a CUDA device; "sm_89" of the GPU that ``meta`` stands for; else the type of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"sm_{generation(device)}" if counts_as_cuda(device) else device.type


def stand_for(generation: int | None) -> int | None:
    """From now on ``meta`` stands for a GPU of this generation, or (None) for itself; returns what it stood for. For
    ``stand_ins.meta_as``, which also renews what was chosen for ``meta`` and sets both back."""
    global _meta_generation
    before, _meta_generation = _meta_generation, generation
    return before


def known_generation(device: torch.device) -> int:
    """The newest generation of ``GENERATIONS`` whose settings are safe on the device (an 87 runs with those of 86)."""
    here = generation(device)
    if here in GENERATIONS:
        return here
    # Chips between the known ones have at least 99 KiB a block, so that the settings of 86 fit all of them.
    return 86


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def missing_to_build() -> str:
    """What Triton lacks here to compile the C code between Python and the driver, "" where nothing: at its first launch
    it calls the compiler of CC, gcc or clang, with Python's headers."""
    if sys.platform == "win32":  # its Triton brings a compiler
        return ""
    if not os.environ.get("CC") and not shutil.which("gcc") and not shutil.which("clang"):
        return "a C compiler (gcc or clang, or CC names one)"
    scheme = sysconfig.get_default_scheme()
    headers = Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"])
    return "" if (headers / "Python.h").is_file() else f"Python's headers ({headers / 'Python.h'})"


class NoTriton(NamedTuple):
    """``why`` no Triton kernel serves a GPU, and what helps: "" where nothing does."""

    why: str
    remedy: str = ""


def without_triton(device: torch.device) -> NoTriton | None:
    """What keeps Triton's kernels from a CUDA device, or from ``meta`` that stands for one; None where they serve it.
    On ``meta`` nothing is compiled, so that no compiler is missed there.

    Raises: ConfigError, as ``triton_wanted``.
    """
    if not triton_wanted():
        return NoTriton(f"{SWITCH}=0", "unset it for the fused ones")
    if generation(device) < 80:
        return NoTriton(f"{name_of(device)} is older than sm_80")
    if not has_triton():
        return NoTriton("triton is not installed", "`pip install triton` brings the fused ones")
    if device.type == "cuda" and (missing := missing_to_build()):
        return NoTriton(f"Triton needs {missing}", "the fused ones need the system's packages gcc and python3-dev")
    return None


def triton_serves(device: torch.device) -> bool:
    """True from sm_80 on with Triton installed, and what it builds with, on CUDA and on ``meta`` that stands for it; a
    CUDA device that goes without is reported once.

    Raises:
        ConfigError: the environment variable LOWVRAM_TRITON, which switches Triton off with 0, is neither 0 nor 1.
    """
    triton_wanted()  # another value than 0 or 1 is refused on every device
    if not counts_as_cuda(device):
        return False
    found = without_triton(device)
    if found is not None and device.type == "cuda":
        remedy = f"; {found.remedy}" if found.remedy else ""
        _say_once(f"{found.why}: PyTorch's own kernels run, slower{remedy}")
    return found is None


def triton_wanted() -> bool:
    """Whether LOWVRAM_TRITON is 1, empty or not set. Raises: ConfigError where it is neither 0 nor 1."""
    value = os.environ.get(SWITCH) or "1"
    if value not in ("0", "1"):
        raise ConfigError(f"{SWITCH} is {value!r}; expected 0 (no Triton kernels) or 1, which is the default")
    return value == "1"


def has_fp8_units(device: torch.device) -> bool:
    """CUDA from sm_89 on, and ``meta`` that stands for it; everything else computes fp8 products through its library
    and counts as having them."""
    return not counts_as_cuda(device) or generation(device) >= 89


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)
