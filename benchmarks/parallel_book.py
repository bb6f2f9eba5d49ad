"""One rank's figures for ``parallel.py``: bytes sent, parameters held, seconds."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram.parallel.rank_team import RankTeam
from lowvram.schedule import Block

Tensor = torch.Tensor


class Wire(TorchDispatchMode):
    """Counts the bytes that collectives and sends take to other ranks, below everything that calls them: in an
    all-gather a rank's own part goes to all others, whichever way."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = Counter(exchange=0, latents=0, parameters=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        if name == "alltoall_base_":
            _, flat, group, _, lengths = args[:5]
            own = lengths[dist.ProcessGroup.unbox(group).rank()]
            self.sent["exchange"] += (flat.numel() - own) * flat.element_size()
        elif name == "_allgather_base_":
            _, own, group = args[:3]
            self.sent["parameters"] += own.nbytes * (dist.ProcessGroup.unbox(group).size() - 1)
        elif name == "send":
            self.sent["latents"] += sum(letter.nbytes for letter in args[0])
        elif name == "allreduce_" and sum(each.numel() for each in args[0]) == 1:
            pass  # ranks of a stage tell each other whether memory ran out: a number a pass, in host memory
        elif name not in ("recv_", "barrier"):
            raise NotImplementedError(f"{name} is not counted; expected no such operation from block to block")


class Book:
    """One rank's figures."""

    def __init__(self, team: RankTeam, device: torch.device, *, counts: bool):
        self.device, self._team = device, team
        self._wire = Wire() if counts else None
        self._parameter_bytes = 0
        self._marks: list[dict[str, Any]] = []

    def counting(self) -> contextlib.AbstractContextManager[Any]:
        return self._wire or contextlib.nullcontext()

    def watch(self, dit: nn.Module, shards: Iterable[Tensor]) -> None:
        """See what parameters are there whenever a block of the DiT begins; ``shards`` are there all the time."""
        if self._wire is None:
            return
        kept = storages(shards)

        def look(block: nn.Module, args: Any) -> None:
            there = kept | storages(dit.parameters())
            self._parameter_bytes = max(self._parameter_bytes, sum(there.values()))

        for block in dit.blocks:
            block.register_forward_pre_hook(look)

    def mark(self, block: Block, latent: Tensor) -> None:
        """``block`` has taken its last step here."""
        if not latent.isfinite().all():
            raise RuntimeError(f"block {block.index} is not finite: its latents would be compared in vain")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._marks.append(
            {
                "s": time.perf_counter(),
                "sent": dict(self._wire.sent) if self._wire else {},
                "told": self._team.sent_bytes(),
                "latent": hashlib.sha256(latent.float().cpu().numpy().tobytes()).hexdigest()[:16],
            }
        )

    def report(self, blocks: slice) -> dict[str, Any]:
        """Of the steady state: from the first of ``blocks`` to the last."""
        steady = self._marks[blocks]
        seconds = (steady[-1]["s"] - steady[0]["s"]) / (len(steady) - 1)
        return {
            "role": self._team.role.name,
            "sent_bytes": _each(steady, "sent"),
            "sent_bytes_by_runtime": _each(steady, "told"),
            "parameter_bytes": self._parameter_bytes,
            "seconds_per_block": seconds,
            "latents": [mark["latent"] for mark in self._marks],
        }


def _each(marks: list[dict[str, Any]], what: str) -> dict[str, int]:
    """What each block adds, which has to be the same for all."""
    found = [
        {key: after[what][key] - before[what][key] for key in after[what]}
        for before, after in itertools.pairwise(marks)
    ]
    if any(other != found[0] for other in found):
        raise RuntimeError(f"blocks differ in the bytes sent: {found}")
    return found[0]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes that tensors have behind them, each stretch of memory once."""
    found = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.device.type != "meta":
            storage = local.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return found
