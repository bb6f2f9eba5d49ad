"""Machines that are not here."""

from __future__ import annotations

import dataclasses
from typing import Any

from lowvram.doctor.probes import CardState, Driver, Gpu, Names, Pinned, Probes, Torch
from lowvram.doctor.wants import RankWants, Wants

GIB, MIB = 2**30, 2**20
CUDA_TORCH = Torch(version="2.13.0+cu130", cuda="13.0", architectures=("sm_75", "sm_80", "sm_86", "sm_90", "sm_120"))
CPU_TORCH = Torch(version="2.13.0+cpu", cuda=None)
NAMES = Names(host="box", addresses=("10.0.0.2",), interfaces={"lo": ("127.0.0.1", "::1"), "eth0": ("10.0.0.2",)})
LOOPING = dataclasses.replace(NAMES, addresses=("127.0.1.1",))
ALONE = RankWants(name="", vram_bytes=20 * GIB, bytes_in=13 * 10**9, bytes_out=6 * 10**9, busy_s=2.5)
WANTS = Wants(what="a model", ranks=(ALONE,), host_bytes=21 * GIB, pinned_bytes=18 * GIB, artifact_bytes=25 * GIB)
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


NOTHING = Pinned(nbytes=0, status=2)


def everything(nbytes: int) -> Pinned:
    return Pinned(nbytes=nbytes, status=0)


def gpu(index: int = 0, **changes: Any) -> Gpu:
    sizes = {
        "name": "NVIDIA GeForce RTX 4090", "generation": 89, "fp8": True, "triton": True,
        "free_bytes": int(23.5 * GIB), "total_bytes": 24 * GIB,
    }  # fmt: skip
    return Gpu(index=index, **sizes | changes)


def rtx3090(index: int = 0, **changes: Any) -> Gpu:
    return gpu(index, **{"name": "NVIDIA GeForce RTX 3090", "generation": 86, "fp8": False} | changes)


def h200(index: int = 0) -> Gpu:
    return gpu(index, name="NVIDIA H200", generation=90, free_bytes=138 * GIB, total_bytes=140 * GIB)


def raising(error: Exception):
    def ask(*_: object):
        raise error

    return ask


def machine(*gpus: Gpu, **answers: Any) -> Probes:
    """A sound Linux machine with these GPUs; ``answers`` are given instead. A callable is the probe itself."""
    sound: dict[str, Any] = {
        "python": (3, 11, 7), "torch": CUDA_TORCH if gpus else CPU_TORCH, "triton": "3.9.0",
        "compiler": "",
        "driver": Driver(cuda=(13, 0), version="580.65") if gpus else None, "gpus": gpus,
        "card_states": {g.index: CardState(display=False, link_gen=4, link_lanes=16) for g in gpus},
        "pcie": (25e9, 25e9), "peers": True, "ram": (60 * GIB, 64 * GIB), "memlock": None, "pin": everything,
        "kernel": "Linux version 6.8", "disk_free": 500 * GIB, "shared_memory": 32 * GIB,
        "encoders": frozenset({"libx264", "aac"}), "nccl": "2.28.9" if gpus else None, "gloo": True, "bind": "",
        "free_port": 40000, "names": NAMES, "cores": 16, "environ": EXPANDABLE,
    }  # fmt: skip
    assert not set(answers) - set(sound)
    return Probes(**{name: _probe(answer) for name, answer in (sound | answers).items()})


def _probe(answer: Any) -> Any:
    return answer if callable(answer) else lambda *_: answer


def four_4090s(**answers: Any) -> Probes:
    """As bought: no card reaches another."""
    return machine(*(gpu(index) for index in range(4)), **{"peers": False} | answers)


def wsl(**answers: Any) -> Probes:
    kernel = "Linux version 6.6.87.2-microsoft-standard-WSL2"
    return machine(
        rtx3090(),
        **{"kernel": kernel, "ram": (14 * GIB, 16 * GIB), "pin": NOTHING, "memlock": 8 * MIB} | answers,
    )
