"""Rank environment: which rank a process is, and its device, as whoever started it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch

from lowvram.devices import cuda_is_here
from lowvram_kernels.errors import ConfigError, HardwareError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankEnv:
    """What the starter (torchrun, or ``infer --gpus``) says to a rank in its environment. ``by_hand``: neither of them
    did, so that somebody has set it, or an earlier run left it behind."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    by_hand: bool = False

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> RankEnv | None:
        """None where nobody started ranks.

        Raises:
            ConfigError: half of what a rank has to be told is missing, is no number, or cannot be.
        """
        told = told_by(environ)
        if "WORLD_SIZE" not in told and "RANK" not in told:
            return None
        if missing := [name for name in NAMES if name not in told]:
            raise ConfigError(
                f"{said_of(told)}, as for one of several ranks, and {', '.join(missing)} is not set; expected torchrun "
                f"or --gpus to set all of them: {for_one(told)}"
            )
        try:
            rank, world, local, port = (int(told[name]) for name in NAMES if name != "MASTER_ADDR")
        except ValueError as error:
            raise ConfigError(
                f"{said_of(told)}; expected whole numbers of all but MASTER_ADDR ({error}): {for_one(told)}"
            ) from error
        if not 0 <= rank < world or local < 0 or not 0 < port < 2**16:
            raise ConfigError(
                f"{said_of(told)}, which cannot be; expected RANK below WORLD_SIZE, LOCAL_RANK from 0 on and "
                f"MASTER_PORT from 1 to 65535: {for_one(told)}"
            )
        return cls(
            rank=rank,
            world_size=world,
            local_rank=local,
            address=told["MASTER_ADDR"],
            port=port,
            by_hand="TORCHELASTIC_RUN_ID" not in environ and environ.get("LOWVRAM_STARTED") != "1",
        )

    @property
    def hint(self) -> str:
        """What else may be meant, to end a message with; "" where a starter is known."""
        if not self.by_hand:
            return ""
        return f"; RANK={self.rank} and WORLD_SIZE={self.world_size} in the environment say so: {for_one(NAMES[:2])}"


def told_by(environ: Mapping[str, str]) -> dict[str, str]:
    """Of what a starter sets, that which is there; an empty value is none."""
    return {name: environ[name].strip() for name in NAMES if environ.get(name, "").strip()}


def said_of(told: Mapping[str, str]) -> str:
    words = [f"{name}={value}" for name, value in told.items()]
    return f"{', '.join(words)} {'is' if len(words) == 1 else 'are'} set in the environment"


def for_one(names: Iterable[str]) -> str:
    """What to do about variables that nobody meant."""
    return f"where nobody started ranks, unset {' '.join(names)}"


def rank_device(name: str, env: RankEnv) -> str:
    """The device of a rank: its own GPU, or the CPU.

    Raises:
        ConfigError: one GPU is named for all ranks.
        HardwareError: there are fewer GPUs than ranks on this machine.
    """
    if name == "cpu" or (name == "auto" and not cuda_is_here()):
        return "cpu"
    if name not in ("auto", "cuda"):
        raise ConfigError(f"--device is {name!r}; expected auto, cuda or cpu where {env.world_size} ranks run")
    count = torch.cuda.device_count()
    if env.local_rank >= count:
        raise HardwareError(
            f"rank {env.rank} is number {env.local_rank} of this machine, but {count} GPUs are here; start fewer "
            "ranks, or give --device cpu"
        )
    torch.cuda.set_device(env.local_rank)
    return f"cuda:{env.local_rank}"
