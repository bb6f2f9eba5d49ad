"""Checks of the host: memory, what may be pinned of it, WSL, disk."""

from __future__ import annotations

from pathlib import Path

from lowvram.byte_sizes import gib
from lowvram.doctor.findings import Finding, ok, problem, warning
from lowvram.doctor.probes import Probes
from lowvram.doctor.wants import Wants

MIB = 2**20
# Pinned at a try: at least more than any usual limit on locked memory, so that the try tells whether the driver minds
# it; as much as a run would pin where that is less than the most that a check may take, beyond what WSL lets be pinned.
TRY_BYTES = 64 * MIB
LARGEST_TRY_BYTES = 4096 * MIB
SHARE_OF_FREE = 4
# A minute of video takes some 30 MB, the dumps of a comparison a few hundred.
WORK_BYTES = 2**30


def check_ram(probes: Probes, wants: Wants, *, planned: bool) -> Finding:
    """``planned``: a run of that model is meant; else too little memory is only worth knowing."""
    available, total = probes.ram()
    found = f"{gib(available)} of {gib(total)} available"
    expected = f"{gib(wants.host_bytes)} for {wants.what}"
    if wants.host_bytes <= available:
        return ok("ram", f"{found}; {expected}")
    if wants.host_bytes <= total:
        advice, why = "close other programs first", "what is missing is held by others now"
        return warning("ram", found, expected=expected, advice=advice, why=why)
    say = problem if planned else warning
    return say(
        "ram",
        found,
        expected=expected,
        advice="take a machine with more memory, or see lowvram plan for a smaller --size or --infer-frames",
        why="what is on no card is read from host memory in every block, too often to be swapped",
    )


def check_pinning(probes: Probes, wants: Wants | None, *, on_gpu: bool) -> Finding:
    if not on_gpu:
        return ok("pinning", "not used on the processor")
    limit = probes.memlock()
    said = "no limit on locked memory" if limit is None else f"limit on locked memory {limit // 1024} KiB"
    available, _ = probes.ram()
    wanted = max(TRY_BYTES, min(wants.pinned_bytes if wants else TRY_BYTES, LARGEST_TRY_BYTES))
    pinned = probes.pin(min(wanted, max(TRY_BYTES, available // SHARE_OF_FREE)))
    found = f"{pinned.nbytes // MIB} MiB pinned, {said}"
    if pinned.status == 0:
        return ok("pinning", found)
    expected = f"{gib(wants.pinned_bytes)} pinned for {wants.what}" if wants else f"{wanted // MIB} MiB"
    raised = "in .wslconfig, raise [wsl2] memory" if is_wsl(probes.kernel()) else "raise the limit: ulimit -l unlimited"
    why = "copies out of memory that is not pinned do not run beside the computation"
    if pinned.nbytes:
        why = "the rest is copied through a little memory that is pinned, beside the computation but slower"
    return warning(
        "pinning",
        f"{found}; then the driver returned {pinned.status}",
        expected=expected,
        advice=f"{raised} (containers: --ulimit memlock=-1)",
        why=why,
    )


def is_wsl(kernel: str) -> bool:
    return "microsoft" in kernel.lower()


def check_wsl(probes: Probes) -> Finding:
    if not is_wsl(probes.kernel()):
        return ok("wsl", "no")
    return warning(
        "wsl",
        "this is the Windows Subsystem for Linux",
        advice="in .wslconfig give [wsl2] memory= most of the machine, keep artifacts off /mnt/c, end Windows programs "
        "that use the GPU",
        why="it has half of Windows' memory unless told otherwise, pins less than Linux does, and reads /mnt slowly",
    )


def check_disk(probes: Probes, folder: Path, wants: Wants | None, *, converted: bool) -> Finding:
    """``converted``: the artifact is there already."""
    check, free = f"disk {folder}", probes.disk_free(folder)
    if free < WORK_BYTES:
        return problem(
            check,
            f"{gib(free)} free",
            expected=f"{gib(WORK_BYTES)} for videos and reports",
            advice="make room, or give --out on another disk",
            why="a run whose disk fills up ends with what it wrote until then",
        )
    if wants is not None and not converted and free < wants.artifact_bytes:
        return warning(
            check,
            f"{gib(free)} free",
            expected=f"{gib(wants.artifact_bytes)} for the artifact of {wants.what}",
            advice="give convert --out on another disk",
            why="convert stops where the disk is full, and goes on where it was when run again",
        )
    return ok(check, f"{gib(free)} free")
