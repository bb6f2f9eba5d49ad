"""What ``nvidia-smi`` says of each card, which CUDA does not."""

from __future__ import annotations

import os
import shutil
import subprocess

import torch

from lowvram.doctor.probes import CardState

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
