"""Checks of what several ranks need to find and to reach each other."""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Mapping, Sequence

from lowvram.byte_sizes import gib
from lowvram.doctor.findings import Finding, ok, problem, warning
from lowvram.doctor.probes import Gpu, Names, Probes
from lowvram.parallel.rank_env import for_one, said_of, told_by

# NCCL's buffers in shared memory between two ranks that cannot reach each other's card: some segments of 9 MiB each
# way. Containers start with 64 MiB of /dev/shm, which two ranks just fit in.
NCCL_PAIR_BYTES = 64 * 2**20
# GeForce cards of these generations have no peer-to-peer over PCIe, whatever a driver says; the RTX 30 had NVLink.
NO_PEERS = re.compile(r"GeForce RTX (40|50)\d\d")
_VIRTUAL = ("docker", "veth", "br-", "virbr", "tun", "tap", "ifb", "dummy")


def check_backend(probes: Probes, *, on_gpu: bool) -> list[Finding]:
    return [_nccl(probes, on_gpu=on_gpu), _gloo(probes)]


def _nccl(probes: Probes, *, on_gpu: bool) -> Finding:
    version = probes.nccl()
    if version is not None:
        return ok("nccl", version)
    if not on_gpu:
        return ok("nccl", "not in this PyTorch, and not used on the processor")
    return problem(
        "nccl",
        "not in this PyTorch",
        advice="run on Linux, with a PyTorch build for CUDA",
        why="ranks exchange heads and latents between cards through it",
    )


def _gloo(probes: Probes) -> Finding:
    if probes.gloo():
        return ok("gloo", "in this PyTorch")
    advice, why = "install a PyTorch of pytorch.org", "ranks on the processor exchange everything through it"
    return problem("gloo", "not in this PyTorch", advice=advice, why=why)


def check_peers(probes: Probes, gpus: Sequence[Gpu]) -> Finding:
    """Every pair, both ways."""
    pairs = list(itertools.permutations([gpu.index for gpu in gpus], 2))
    apart = [pair for pair in pairs if not probes.peers(*pair)]
    switched_off = probes.environ().get("NCCL_P2P_DISABLE", "0") not in ("", "0")
    claimed = sorted({gpu.name for gpu in gpus if NO_PEERS.search(gpu.name)})
    found = _peers_found(len(pairs), apart) + (", NCCL_P2P_DISABLE is set" if switched_off else "")
    if switched_off and not apart and not claimed:
        advice, why = "unset NCCL_P2P_DISABLE", "the cards reach each other, and the way over host memory is slower"
        return warning("p2p", found, advice=advice, why=why)
    if switched_off or not (apart or claimed):
        return ok("p2p", found)
    reason = "some drivers let NCCL try it all the same, and the first exchange hangs"
    if not apart:
        reason = f"{claimed[0]} has none over PCIe, and drivers that claim it hang or deliver wrong bytes"
    return warning(
        "p2p",
        found,
        expected="peer access between all cards, or NCCL told to do without",
        advice="export NCCL_P2P_DISABLE=1",
        why=f"{reason}; with it ranks exchange through host memory",
    )


def _peers_found(pairs: int, apart: Sequence[tuple[int, int]]) -> str:
    if not apart:
        return f"peer access in all {pairs} directions"
    if len(apart) == pairs:
        return "no peer access between any cards"
    return "no peer access " + ", ".join(f"{a} -> {b}" for a, b in apart)


def check_shared_memory(probes: Probes, ranks: int, *, on_gpu: bool) -> Finding:
    """NCCL's buffers are all that lies in /dev/shm: weights that ranks share have memory files of their own."""
    free = probes.shared_memory()
    if not on_gpu:
        return ok("shm", "not used on the processor")
    if free is None:
        advice, why = "run on Linux", "NCCL exchanges through it where cards do not reach each other"
        return warning("shm", "no /dev/shm", advice=advice, why=why)
    nccl = ranks * (ranks - 1) // 2 * NCCL_PAIR_BYTES
    if free < nccl:
        return problem(
            "shm",
            f"{gib(free)} free in /dev/shm",
            expected=f"{gib(nccl)} for NCCL's buffers between {ranks} ranks",
            advice=f"start the container with --shm-size={-(-nccl // 2**30)}g or more, or --ipc=host",
            why="NCCL fails when it cannot make them",
        )
    return ok("shm", f"{gib(free)} free in /dev/shm, {gib(nccl)} wanted")


def check_port(probes: Probes, port: int) -> Finding:
    error = probes.bind(port)
    if not error:
        return ok("port", f"{port} is free")
    return problem(
        "port",
        f"{port} cannot be used ({error})",
        advice=f"take another, as {probes.free_port()} (torchrun --master-port, or MASTER_PORT), or end what holds it",
        why="ranks meet at that port",
    )


def check_left_over(probes: Probes) -> Finding:
    """What torchrun tells a rank, and a shell or a container may have kept."""
    told = told_by(probes.environ())
    if not {"RANK", "WORLD_SIZE"} & told.keys():
        return ok("rank variables", "RANK and WORLD_SIZE are not set")
    return warning(
        "rank variables",
        said_of(told),
        expected="none of them, where nobody starts ranks",
        advice=for_one(told),
        why="infer takes itself for one of several ranks, and waits for the others",
    )


def check_names(probes: Probes) -> Finding:
    names, environ = probes.names(), probes.environ()
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if absent := _absent(variable, environ, names):
            return absent
    reachable = sorted(set(names.addresses) & _outside(names))
    if reachable or "GLOO_SOCKET_IFNAME" in environ:
        where = f"resolves to {', '.join(reachable)}" if reachable else "has an interface set"
        return ok("host name", f"{names.host} {where}")
    found = f"{names.host} resolves to {', '.join(names.addresses)}" if names.addresses else f"{names.host}: no address"
    return warning(
        "host name",
        found,
        expected="an address of an interface that other machines reach",
        advice=_interface_advice(names),
        why="gloo listens where the name points to: fine for ranks of one machine, out of reach for others",
    )


def _absent(variable: str, environ: Mapping[str, str], names: Names) -> Finding | None:
    """NCCL's values are prefixes, "=eth0" is exact and "^docker" is not; gloo's are exact."""
    value = environ.get(variable, "")
    if not value or value.startswith("^"):
        return None
    wanted, exact = value.lstrip("="), value.startswith("=") or variable.startswith("GLOO")
    for part in wanted.split(","):
        if any(name == part or (not exact and name.startswith(part)) for name in names.interfaces):
            continue
        return problem(
            "host name",
            f"{variable}={value}",
            expected=f"one of {', '.join(names.interfaces) or 'no interface'}",
            advice=f"unset {variable}, or {_interface_advice(names)}",
            why="no interface of that name is up here, and ranks would not find each other",
        )
    return None


def _outside(names: Names) -> set[str]:
    """Addresses of this host that others can reach."""
    every = itertools.chain.from_iterable(names.interfaces.values())
    return {address for address in every if not _is_local(address)}


def _is_local(address: str) -> bool:
    """Of the host's own loop, or without meaning on another machine."""
    parsed = ipaddress.ip_address(address.split("%")[0])
    return parsed.is_loopback or parsed.is_link_local


def _interface_advice(names: Names) -> str:
    for name, addresses in names.interfaces.items():
        if not name.startswith(_VIRTUAL) and any(not _is_local(address) for address in addresses):
            return f"export GLOO_SOCKET_IFNAME={name} NCCL_SOCKET_IFNAME={name} for ranks on several machines"
    return "connect a network before ranks on several machines are started"


def check_threads(probes: Probes, ranks: int, *, on_gpu: bool) -> Finding:
    value, cores = probes.environ().get("OMP_NUM_THREADS", ""), probes.cores()
    share = max(1, cores // ranks)
    found = f"{f'OMP_NUM_THREADS={value}' if value else 'OMP_NUM_THREADS is not set'}, {cores} cores, {ranks} ranks"
    advice = f"export OMP_NUM_THREADS={share}"
    if value and not (value.isdecimal() and int(value)):
        return problem("threads", found, expected="a number above 0", advice=advice, why="OpenMP does not read it")
    if value and int(value) * ranks > max(cores, ranks):
        why = "threads of several ranks wait for each other's cores"
        return warning("threads", found, expected=f"{share} a rank", advice=advice, why=why)
    if not on_gpu and share > 1 and int(value or 1) < share:
        why = "torchrun gives each rank one thread unless told otherwise, and the processor does all the work here"
        return warning("threads", found, expected=f"{share} a rank", advice=advice, why=why)
    return ok("threads", found)
