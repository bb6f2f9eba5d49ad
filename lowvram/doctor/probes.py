"""Probes of a machine: all that it can be asked. Checks ask nothing else, so that a test can invent every machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Torch:
    """``cuda`` is the CUDA version that PyTorch was built with, None without; ``architectures`` as "sm_90"."""

    version: str
    cuda: str | None
    architectures: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Driver:
    """``cuda`` is the newest CUDA (major, minor) that the driver serves; ``version`` "" where it is not said."""

    cuda: tuple[int, int]
    version: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """``generation`` is the compute capability without the dot; ``fp8`` FP8 units; ``triton`` whether the Triton
    kernels serve it. Bytes of memory that are free now, and in all."""

    index: int
    name: str
    generation: int
    fp8: bool
    triton: bool
    free_bytes: int
    total_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardState:
    """What ``nvidia-smi`` says beside. None where it says nothing. The link is what card and board reach together;
    ``processes`` are others that compute on the card, as "python (pid 12) 3000 MiB"."""

    display: bool | None = None
    ecc: bool | None = None
    link_gen: int | None = None
    link_lanes: int | None = None
    processes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """The host's name, the addresses that it resolves to (none: it does not), and those of interfaces that are up."""

    host: str
    addresses: tuple[str, ...]
    interfaces: Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pinned:
    """Bytes that could be registered with the driver, and its status of the first piece that could not, 0 where all
    could."""

    nbytes: int
    status: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probes:
    """Questions to a machine. A question may raise anything: the check that asked then says so."""

    python: Callable[[], tuple[int, int, int]]
    torch: Callable[[], Torch]
    triton: Callable[[], str | None]
    """Version, None where it is not installed."""
    compiler: Callable[[], str]
    """Compile C code against Python's headers, as Triton does; what was in the way, "" where that worked."""
    driver: Callable[[], Driver | None]
    gpus: Callable[[], tuple[Gpu, ...]]
    card_states: Callable[[], Mapping[int, CardState]]
    """By the index that CUDA gives; empty without ``nvidia-smi``."""
    pcie: Callable[[int], tuple[float, float]]
    """Measured bytes a second (host to device, device to host) of a GPU."""
    peers: Callable[[int, int], bool]
    ram: Callable[[], tuple[int, int]]
    """Bytes (available, in all)."""
    memlock: Callable[[], int | None]
    """Bytes that a process may lock, None without a limit."""
    pin: Callable[[int], Pinned]
    """Register so many bytes of host memory, a piece after the other, and give them back."""
    kernel: Callable[[], str]
    """The system's kernel, as /proc/version has it."""
    disk_free: Callable[[Path], int]
    shared_memory: Callable[[], int | None]
    """Bytes free in /dev/shm, None where there is none."""
    encoders: Callable[[], frozenset[str]]
    """Those of ``libx264`` and ``aac`` that PyAV's FFmpeg has."""
    nccl: Callable[[], str | None]
    """Version, None where PyTorch has none."""
    gloo: Callable[[], bool]
    bind: Callable[[int], str]
    """Listen on a port of all interfaces for a moment; the error, "" where that worked."""
    free_port: Callable[[], int]
    names: Callable[[], Names]
    cores: Callable[[], int]
    environ: Callable[[], Mapping[str, str]]
