"""Reserve that a plan keeps free on a card beside the tensors that it counts, and whether that was measured there."""

from __future__ import annotations

import dataclasses

from lowvram.planning.cards import Card
from lowvram.planning.library_memory import FLAT_BYTES, SLACK_BYTES
from lowvram.planning.nccl_memory import FLAT_BYTES as NCCL_FLAT_BYTES
from lowvram.planning.share import Share
from lowvram.planning.workload import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reserve:
    """Bytes. ``outside``: libraries and kernels; ``nccl``: the group of a rank that exchanges, 0 where there is none or
    where it has taken its part already; ``slack``: small tensors that nobody counts."""

    outside: int
    outside_measured: bool
    nccl: int = 0
    nccl_measured: bool = False
    slack: int = SLACK_BYTES

    @property
    def total(self) -> int:
        return self.outside + self.nccl + self.slack


def reserve_of(card: Card, work: Workload, share: Share, *, grouped: bool) -> Reserve:
    """Of a card: what was measured there, or flat values; and what NCCL takes of a rank that exchanges, unless ranks
    are ``grouped`` already, which is seen in what is free."""
    found = Reserve(outside=FLAT_BYTES, outside_measured=False)
    if card.outside is not None:
        found = Reserve(outside=card.outside.reserved(work.pixels), outside_measured=True)
    if grouped or not share.exchanges:
        return found
    nccl = dict(card.nccl).get(share.parts)
    return dataclasses.replace(found, nccl=NCCL_FLAT_BYTES if nccl is None else nccl, nccl_measured=nccl is not None)
