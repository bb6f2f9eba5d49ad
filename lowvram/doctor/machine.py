"""The machine at hand, asked; also what ``nvidia-smi`` says of each card, which CUDA does not."""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from lowvram.doctor.probes import CardState, Driver, Gpu, Names, Pinned, Probes, Torch
from lowvram.offload.pinning import driver_library, mapped, registry
from lowvram.planning.measure import COPY_BYTES, REPEATS, CudaRunner, Runner
from lowvram_kernels import chips

_CARD = "uuid,display_active,ecc.mode.current,pcie.link.gen.max,pcie.link.width.max"
_PROCESS = "gpu_uuid,pid,used_memory,process_name"  # the name last: it may have commas
_SECONDS = 20


def card_states() -> dict[int, CardState]:
    """By CUDA's index; empty without ``nvidia-smi``.

    Raises:
        subprocess.SubprocessError: it fails or does not answer.
    """
    if shutil.which("nvidia-smi") is None:
        return {}
    cards, processes = _ask("gpu", _CARD), _ask("compute-apps", _PROCESS)
    states = parse_states(cards, processes, own_pid=os.getpid())
    return {index: states[uuid] for index in range(torch.cuda.device_count()) if (uuid := _uuid(index)) in states}


def _ask(what: str, fields: str) -> str:
    command = ["nvidia-smi", f"--query-{what}={fields}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout


def _uuid(index: int) -> str:
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


def parse_states(cards: str, processes: str, *, own_pid: int) -> dict[str, CardState]:
    """Two tables of comma-separated values to states by the cards' UUIDs."""
    others: dict[str, list[str]] = {}
    for uuid, pid, mebibytes, name in _rows(processes, columns=4):
        if pid != str(own_pid):
            size = f" {mebibytes} MiB" if mebibytes.isdecimal() else ""
            others.setdefault(uuid, []).append(f"{name} (pid {pid}){size}")
    return {
        uuid: CardState(
            display=_switch(display),
            ecc=_switch(ecc),
            link_gen=_number(generation),
            link_lanes=_number(lanes),
            processes=tuple(others.get(uuid, ())),
        )
        for uuid, display, ecc, generation, lanes in _rows(cards, columns=5)
    }


def _rows(text: str, *, columns: int) -> list[list[str]]:
    return [line.split(", ", columns - 1) for line in text.splitlines() if line.strip()]


def _switch(text: str) -> bool | None:
    return {"Enabled": True, "Disabled": False}.get(text)


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_SHARED_MEMORY = Path("/dev/shm")
PIN_PIECE_BYTES = 64 << 20


def this_machine() -> Probes:
    return Probes(
        python=lambda: sys.version_info[:3],
        torch=_torch,
        triton=_triton,
        compiler=compiler,
        driver=_driver,
        gpus=_gpus,
        card_states=card_states,
        pcie=lambda index: pcie_rates(CudaRunner(torch.device("cuda", index))),
        peers=torch.cuda.can_device_access_peer,
        ram=_ram,
        memlock=_memlock,
        pin=pin,
        kernel=_kernel,
        disk_free=lambda folder: shutil.disk_usage(folder).free,
        shared_memory=lambda: shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None,
        encoders=_encoders,
        nccl=_nccl,
        gloo=lambda: torch.distributed.is_available() and torch.distributed.is_gloo_available(),
        bind=bind,
        free_port=free_port,
        names=_names,
        cores=lambda: len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        environ=lambda: os.environ,
    )


def _torch() -> Torch:
    return Torch(version=torch.__version__, cuda=torch.version.cuda, architectures=tuple(torch.cuda.get_arch_list()))


def _triton() -> str | None:
    if not chips.has_triton():
        return None
    # Its distribution has other names on Windows and in nightly builds: the module itself says what it is.
    return str(importlib.import_module("triton").__version__)


def compiler() -> str:
    """Compile C code against Python's headers, as Triton does; what was in the way, "" where that worked."""
    if missing := chips.missing_to_build():
        return f"missing: {missing}"
    if sys.platform == "win32":
        return ""
    command = os.environ.get("CC") or shutil.which("gcc") or "clang"
    scheme = sysconfig.get_default_scheme()
    headers = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    with tempfile.TemporaryDirectory(prefix="lowvram-doctor-") as folder:
        source = Path(folder) / "launcher.c"
        source.write_text("#include <Python.h>\nint launcher(void) { return PY_MAJOR_VERSION; }\n", encoding="utf-8")
        call = [command, str(source), "-shared", "-fPIC", f"-I{headers}", "-o", str(source.with_suffix(".so"))]
        try:
            done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{command} cannot be run: {error}"
    return "" if done.returncode == 0 else f"{command} failed: {' '.join(done.stderr.split())[:300]}"


def _driver() -> Driver | None:
    """Asked of the driver itself: a PyTorch without CUDA does not know of it."""
    if (library := driver_library()) is None:
        return None
    number = ctypes.c_int()
    if status := library.cuDriverGetVersion(ctypes.byref(number)):
        raise RuntimeError(f"cuDriverGetVersion returned {status}")
    return Driver(cuda=(number.value // 1000, number.value % 1000 // 10), version=_driver_version())


def _driver_version() -> str:
    try:
        return _DRIVER_FILE.read_text(encoding="utf-8").split("Kernel Module")[1].split()[0]
    except (OSError, IndexError):  # Windows and WSL have no such file
        return ""


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    return tuple(_gpu(index) for index in range(torch.cuda.device_count()))


def _gpu(index: int) -> Gpu:
    device = torch.device("cuda", index)
    free, total = torch.cuda.mem_get_info(device)
    return Gpu(
        index=index,
        name=torch.cuda.get_device_name(device),
        generation=chips.generation(device),
        fp8=chips.has_fp8_units(device),
        triton=chips.triton_serves(device),
        free_bytes=free,
        total_bytes=total,
    )


def pcie_rates(runner: Runner) -> tuple[float, float]:
    """Bytes a second (in, out) of pinned copies: the best of the warm ones.

    Measured anew each time and card by card: kept rates are those of the first card of a name, whatever its slot.
    """
    best = [min([runner.seconds(way) for _ in range(REPEATS + 1)][1:]) for way in ("h2d", "d2h")]
    return COPY_BYTES / best[0], COPY_BYTES / best[1]


def _ram() -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _memlock() -> int | None:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def pin(nbytes: int) -> Pinned:
    """As a run does it; what was registered goes back at the end."""
    kept = []
    for first in range(0, nbytes, PIN_PIECE_BYTES):
        piece = mapped(min(PIN_PIECE_BYTES, nbytes - first))
        if status := registry().pin(piece):
            return Pinned(nbytes=first, status=status)
        kept.append(piece)
    return Pinned(nbytes=nbytes, status=0)


def _kernel() -> str:
    try:
        return Path("/proc/version").read_text(encoding="utf-8")
    except FileNotFoundError:  # not Linux
        return sys.platform


def _encoders() -> frozenset[str]:
    from av.codec import Codec
    from av.codec.codec import UnknownCodecError

    found = set()
    for name in ("libx264", "aac"):
        try:
            Codec(name, "w")
        except UnknownCodecError:
            continue
        found.add(name)
    return frozenset(found)


def _nccl() -> str | None:
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return None
    version: Any = torch.cuda.nccl.version()
    return ".".join(str(part) for part in version)


def bind(port: int) -> str:
    """Listen for a moment where the ranks' rendezvous will; the system's error, "" without one."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        # As PyTorch's store does: a port that was just left is free, one that somebody listens at is not.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("", port))
            listening.listen(1)
        except OSError as error:
            return "taken by another program" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
    return ""


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.bind(("", 0))
        return int(listening.getsockname()[1])


def _names() -> Names:
    host = socket.gethostname()
    try:
        found = socket.getaddrinfo(host, None)
    except socket.gaierror:
        found = []
    return Names(
        host=host, addresses=tuple(dict.fromkeys(str(entry[4][0]) for entry in found)), interfaces=_interfaces()
    )


def _interfaces() -> Mapping[str, tuple[str, ...]]:
    """Addresses of those that are up and have any."""
    stats = psutil.net_if_stats()
    up = {name: addresses for name, addresses in psutil.net_if_addrs().items() if name in stats and stats[name].isup}
    internet = (socket.AF_INET, socket.AF_INET6)
    kept = {name: tuple(a.address for a in addresses if a.family in internet) for name, addresses in up.items()}
    return {name: addresses for name, addresses in kept.items() if addresses}
