"""Which rank a process is, and which device it has: said by whoever started it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from lowvram.devices import cuda_is_here
from lowvram_kernels.errors import ConfigError, HardwareError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seat:
    """What the starter (torchrun, or ``infer --gpus``) says to a rank in its environment."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Seat | None:
        """None where nobody started ranks.

        Raises:
            ConfigError: half of what a rank has to be told is missing, or is no number.
        """
        if "WORLD_SIZE" not in environ and "RANK" not in environ:
            return None
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in names if not environ.get(name)]:
            raise ConfigError(
                f"RANK or WORLD_SIZE is set, as for one of several ranks, and {', '.join(missing)} is not; expected "
                "torchrun or --gpus to set them: unset RANK and WORLD_SIZE for a run of one"
            )
        try:
            rank, world, local, port = (int(environ[name]) for name in names if name != "MASTER_ADDR")
        except ValueError as error:
            raise ConfigError(f"{', '.join(names)} are to be whole numbers: {error}") from error
        return cls(rank=rank, world_size=world, local_rank=local, address=environ["MASTER_ADDR"], port=port)


def rank_device(name: str, seat: Seat) -> str:
    """The device of a rank: its own GPU, or the CPU.

    Raises:
        ConfigError: one GPU is named for all ranks.
        HardwareError: there are fewer GPUs than ranks on this machine.
    """
    if name == "cpu" or (name == "auto" and not cuda_is_here()):
        return "cpu"
    if name not in ("auto", "cuda"):
        raise ConfigError(f"--device is {name!r}; expected auto, cuda or cpu where {seat.world_size} ranks run")
    count = torch.cuda.device_count()
    if seat.local_rank >= count:
        raise HardwareError(
            f"rank {seat.rank} is number {seat.local_rank} of this machine, but {count} GPUs are here; start fewer "
            "ranks, or give --device cpu"
        )
    torch.cuda.set_device(seat.local_rank)
    return f"cuda:{seat.local_rank}"
