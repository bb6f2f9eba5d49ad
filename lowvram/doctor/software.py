"""Checks of what is installed: Python, PyTorch, Triton, the driver, FFmpeg, and PyTorch's allocator."""

from __future__ import annotations

import re

from lowvram.doctor.findings import Finding, ok, problem, warning
from lowvram.doctor.probes import Probes

# As in pyproject.toml: with less, pip would not have installed lowvram unless it was told to.
PYTHON, TORCH, TRITON = (3, 10), (2, 10), (3, 4)


def check_python(probes: Probes) -> Finding:
    version = probes.python()
    found = ".".join(map(str, version))
    if version[:2] < PYTHON:
        advice = f"make a virtual environment of a newer Python and install there ({_dotted(PYTHON)} or newer)"
        return problem("python", found, advice=advice, why="the code uses its syntax")
    return ok("python", found)


def check_torch(probes: Probes) -> Finding:
    torch, driver = probes.torch(), probes.driver()
    found = f"{torch.version}, {'CUDA ' + torch.cuda if torch.cuda else 'without CUDA'}"
    if numbers(torch.version) < TORCH:
        advice, why = "pip install --upgrade torch", "older ones lack operations that are called"
        return problem("torch", found, expected=f"{_dotted(TORCH)} or newer", advice=advice, why=why)
    if torch.cuda is None and driver is not None:
        return problem(
            "torch",
            found,
            expected=f"a build for CUDA {_dotted(driver.cuda)} or older, which the driver serves",
            advice="install PyTorch again with the command that pytorch.org shows for CUDA",
            why="an NVIDIA driver is here, and this build computes on the processor only",
        )
    return ok("torch", found)


def check_driver(probes: Probes) -> Finding:
    torch, driver = probes.torch(), probes.driver()
    if driver is None:
        return warning(
            "driver",
            "no NVIDIA driver",
            advice="to use a GPU, install the driver (in a container, start it with --gpus all)",
            why="PyTorch reaches GPUs through it",
        )
    found = f"{driver.version or 'version not said'}, serves CUDA {_dotted(driver.cuda)}"
    if torch.cuda is None:
        return ok("driver", found)
    built = numbers(torch.cuda)
    if driver.cuda[0] < built[0]:
        return problem(
            "driver",
            found,
            expected=f"CUDA {torch.cuda}, which PyTorch is built with",
            advice=f"update the driver, or install PyTorch for CUDA {driver.cuda[0]}",
            why="a driver cannot serve a newer major version",
        )
    if driver.cuda < built:
        return warning(
            "driver",
            found,
            expected=f"CUDA {torch.cuda}, which PyTorch is built with",
            advice="update the driver if a kernel fails to load",
            why="within a major version older drivers work, but cannot compile the newer intermediate code",
        )
    return ok("driver", found)


def check_triton(probes: Probes, *, on_gpu: bool) -> Finding:
    version = probes.triton()
    if on_gpu and probes.environ().get("LOWVRAM_TRITON") == "0":
        advice, why = "unset LOWVRAM_TRITON", "PyTorch's own kernels run instead of ours, which takes longer"
        return warning("triton", "switched off by LOWVRAM_TRITON=0", advice=advice, why=why)
    if version is None and not on_gpu:
        return ok("triton", "not installed, and not needed on the processor")
    if version is None:
        why = "PyTorch's own kernels run instead of the fused ones, slower"
        return warning("triton", "not installed", advice="pip install triton", why=why)
    if numbers(version) < TRITON and on_gpu:
        advice, why = "take the one that PyTorch brings", "the fused kernels were not tried with it"
        return warning("triton", version, expected=f"{_dotted(TRITON)} or newer", advice=advice, why=why)
    return ok("triton", version)


def check_compiler(probes: Probes, *, on_gpu: bool) -> Finding:
    """Triton compiles a small C library at its first launch."""
    if not on_gpu or probes.triton() is None or probes.environ().get("LOWVRAM_TRITON") == "0":
        return ok("compiler", "not needed: no Triton kernel runs")
    if not (fault := probes.compiler()):
        return ok("compiler", "C code compiles against Python's headers")
    return warning(
        "compiler",
        fault,
        expected="a C compiler and Python's headers, as Triton calls them at its first launch",
        advice="install the system's packages gcc and python3-dev, or name a compiler in CC",
        why="without them PyTorch's own kernels run instead of the fused ones, slower; with ones that fail, none does "
        "unless LOWVRAM_TRITON=0 is set",
    )


def check_encoders(probes: Probes) -> Finding:
    missing = {"libx264", "aac"} - probes.encoders()
    if missing:
        return problem(
            "ffmpeg",
            f"PyAV's FFmpeg lacks {' and '.join(sorted(missing))}",
            expected="libx264 and aac",
            advice="pip install --force-reinstall --only-binary av av (the wheel brings its own FFmpeg)",
            why="videos are H.264 with AAC sound; a PyAV built against the system's FFmpeg has what that one has",
        )
    return ok("ffmpeg", "libx264 and aac")


def check_allocator(probes: Probes, *, on_gpu: bool) -> Finding:
    environ = probes.environ()
    # PyTorch asks for the older name first (tried with 2.13: of two values the older name's was in effect).
    name = "PYTORCH_CUDA_ALLOC_CONF" if "PYTORCH_CUDA_ALLOC_CONF" in environ else "PYTORCH_ALLOC_CONF"
    value = environ.get(name, "")
    found = f"{name}={value}" if value else f"{name} is empty"
    if not on_gpu:
        return ok("allocator", f"{found}; not used on the processor")
    if re.search(r"\bexpandable_segments\s*:\s*True\b", value):
        return ok("allocator", found)
    added = f"{value.rstrip(',')},expandable_segments:True".lstrip(",")
    if "expandable_segments" in value:
        added = re.sub(r"expandable_segments\s*:\s*\w*", "expandable_segments:True", value)
    unset = f", or unset {name}" if name == "PYTORCH_CUDA_ALLOC_CONF" else ""
    return warning(
        "allocator",
        found,
        expected="expandable_segments:True in it",
        advice=f"export {name}={added}{unset}",
        why="plans fill a card to the last page, and holes between large blocks cost most of a GB without it",
    )


def numbers(version: str) -> tuple[int, int]:
    """ "2.13.0+cpu" -> (2, 13). Raises: ValueError for a text without two numbers."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if not match:
        raise ValueError(f"version is {version!r}, expected one as 2.10.0")
    return int(match[1]), int(match[2])


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
