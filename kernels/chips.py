"""Chips: which one a tensor is on, and whether Triton kernels can serve it there.

Generations are compute capabilities without the dot: 80 (A100), 86 (RTX 30), 89 (RTX 40), 90 (H100, H200), 120
(RTX 50). Everything that is not CUDA is generation 0 and runs the PyTorch versions.
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

import torch

from lowvram_kernels.errors import ConfigError

log = logging.getLogger(__name__)

GENERATIONS = (80, 86, 89, 90, 120)

# Set to 0 it keeps every Triton kernel from running, where one fails on a new GPU or under a new driver.
SWITCH = "LOWVRAM_TRITON"

# Bytes of shared memory that one thread block can have; CUDA C++ programming guide, technical specifications.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}


def generation(device: torch.device) -> int:
    """Compute capability of a CUDA device as one number (8.9 is 89); 0 for any other device."""
    return _capability(device) if device.type == "cuda" else 0


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


def triton_serves(device: torch.device) -> bool:
    """True on CUDA from sm_80 on with Triton installed, and what it builds with; a CUDA device that goes without is
    reported once.

    Raises:
        ConfigError: the environment variable LOWVRAM_TRITON, which switches Triton off with 0, is neither 0 nor 1.
    """
    wanted = triton_wanted()
    if device.type != "cuda":
        return False
    if not wanted:
        _say_once(f"{SWITCH}=0: PyTorch's own kernels run, slower; unset it for the fused ones")
        return False
    if generation(device) < 80:
        _say_once(f"{torch.cuda.get_device_name(device)} is older than sm_80: PyTorch's own kernels run, slower")
        return False
    if not has_triton():
        _say_once(
            "triton is not installed: PyTorch's own kernels run, slower; `pip install triton` brings the fused ones"
        )
        return False
    if missing := missing_to_build():
        _say_once(
            f"Triton needs {missing}: PyTorch's own kernels run, slower; the fused ones need the system's packages gcc "
            "and python3-dev"
        )
        return False
    return True


def triton_wanted() -> bool:
    """Whether LOWVRAM_TRITON is 1, empty or not set. Raises: ConfigError where it is neither 0 nor 1."""
    value = os.environ.get(SWITCH) or "1"
    if value not in ("0", "1"):
        raise ConfigError(f"{SWITCH} is {value!r}; expected 0 (no Triton kernels) or 1, which is the default")
    return value == "1"


def has_fp8_units(device: torch.device) -> bool:
    """CUDA from sm_89 on; the CPU computes fp8 products through its library and counts as having them."""
    return device.type != "cuda" or generation(device) >= 89


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)
