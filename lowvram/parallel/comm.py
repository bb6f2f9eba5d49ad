"""Communication between ranks: the only place where tensors cross; it counts their bytes.

Inside a stage ranks exchange over NCCL on CUDA, over gloo on the CPU. Latents and conditions go over gloo everywhere:
they are small, and a stage that computes does not have to meet the one that receives.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Literal

import torch
import torch.distributed as dist

Tensor = torch.Tensor

# Sends that may be under way before the sender waits for the receiver: what one stage may be ahead of the next.
_AHEAD = 2


@dataclasses.dataclass
class Sent:
    """Bytes that this rank has sent to others, by what they were for."""

    exchange: int = 0
    latents: int = 0
    conditions: int = 0
    voice: int = 0


@dataclasses.dataclass(frozen=True)
class Received:
    """Something on its way to this rank."""

    work: dist.Work
    received: Tensor
    sent: Tensor  # has to stay until it is sent

    def wait(self) -> Tensor:
        self.work.wait()
        return self.received


class StageExchange:
    """All-to-all among the ranks of a stage; see ``lowvram.parallel.ulysses.AllToAll``."""

    def __init__(self, group: dist.ProcessGroup, index: int, count: Sent):
        self._group, self._index, self._count = group, index, count

    def begin(self, flat: Tensor, sent: list[int], received: list[int]) -> Received:
        out = flat.new_empty(sum(received))
        self._count.exchange += (sum(sent) - sent[self._index]) * flat.element_size()
        work = dist.all_to_all_single(out, flat, received, sent, group=self._group, async_op=True)
        return Received(work, out, flat)


class Comm:
    """Tensors from one rank to another through host memory, told apart by their tags; they are counted as what is
    ``sent``. One thread of a process may use it."""

    def __init__(self, group: dist.ProcessGroup, count: Sent, sent: Literal["latents", "voice"] = "latents"):
        self._group, self._count, self._kind = group, count, sent
        self._under_way: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, value: Tensor, to: int, tag: int) -> None:
        """Send float32; returns before it is received, unless the receiver is far behind."""
        letter = value.to("cpu", torch.float32).contiguous()
        setattr(self._count, self._kind, getattr(self._count, self._kind) + letter.nbytes)
        self._under_way.append((_there(dist.isend(letter, to, group=self._group, tag=tag)), letter))
        while len(self._under_way) > _AHEAD:
            self._under_way.popleft()[0].wait()

    def expect(self, shape: tuple[int, ...], sender: int, tag: int) -> Received:
        """Begin to receive float32 of ``shape`` on the CPU."""
        letter = torch.empty(shape)
        return Received(_there(dist.irecv(letter, sender, group=self._group, tag=tag)), letter, letter)

    def settle(self) -> None:
        """Wait until everything sent is received."""
        while self._under_way:
            self._under_way.popleft()[0].wait()

    def broadcast(self, value: Tensor, sender: int) -> None:
        """Send ``value``, on the CPU, to all ranks, or fill it with what the sender has."""
        if dist.get_rank(self._group) == sender:
            self._count.conditions += value.nbytes * (dist.get_world_size(self._group) - 1)
        dist.broadcast(value.view(torch.uint8), sender, group=self._group)


def _there(work: dist.Work | None) -> dist.Work:
    if work is None:
        raise RuntimeError("a rank outside the group sends or receives; expected one of its ranks")
    return work
