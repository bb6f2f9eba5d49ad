"""Memory of a card that NCCL takes for a group of ranks: measured whenever one is made, kept for plans that follow.

A plan before the run has to leave room for it; the run itself plans once more when its groups are made, with what they
have left.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from lowvram.planning.measured import cache_folder, read_cache, write_cache
from lowvram.planning.memory_costs import MIB

log = logging.getLogger(__name__)

FLAT_BYTES = 384 * MIB
"""Of a group of ranks, where nothing was measured: a connection has 4 MiB for each of up to 32 channels (NCCL's
documentation of NCCL_BUFFSIZE and NCCL_MAX_CTAS), both ways, and NCCL's kernels. Not measured: a judgement."""

_WHAT = "what NCCL takes"


class Taken(Protocol):
    """A card that is asked what of it is taken beside torch's allocator; replaced in tests."""

    @property
    def key(self) -> str:
        """The card's name, driver and PyTorch's version, which brings NCCL."""
        ...

    def outside(self) -> int:
        """Bytes that all processes have taken and this one's allocator has not."""
        ...


class CudaTaken:
    def __init__(self, device: torch.device, key: str):
        self._device, self.key = device, key

    def outside(self) -> int:
        torch.cuda.synchronize(self._device)
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - torch.cuda.memory_reserved(self._device)


@contextlib.contextmanager
def measuring_group(card: Taken | None, ranks: int, *, file: Path | None = None) -> Iterator[None]:
    """Keep what a ``card`` has taken beside torch's allocator within, where a group of ``ranks`` does its first
    exchange: NCCL makes its connections with it. Without a card nothing is measured."""
    if card is None:
        yield
        return
    before = card.outside()
    yield
    nbytes = card.outside() - before
    if nbytes <= 0:
        log.info("what NCCL takes cannot be told: another process has given back as much meanwhile")
        return
    file = file or cache_file()
    write_cache(file, _WHAT, _read(file) | {_key(card.key, ranks): nbytes})


def group_bytes(card_key: str, *, file: Path | None = None) -> tuple[tuple[int, int], ...]:
    """Pairs of (ranks of a group, bytes that NCCL took of this card for it): all that were measured."""
    known, before = _read(file or cache_file()), _key(card_key, 0).removesuffix("0 ranks")
    found = ((key.removeprefix(before).removesuffix(" ranks"), n) for key, n in known.items() if key.startswith(before))
    return tuple(sorted((int(ranks), nbytes) for ranks, nbytes in found if ranks.isdigit()))


def cache_file() -> Path:
    return cache_folder() / "grouped.json"


def _key(card_key: str, ranks: int) -> str:
    return f"{card_key} | group of {ranks} ranks"


def _read(file: Path) -> dict[str, int]:
    def parse(nbytes: object) -> int:
        if not isinstance(nbytes, int) or isinstance(nbytes, bool) or nbytes <= 0:
            raise ValueError(f"{nbytes!r} is no number of bytes above 0")
        return nbytes

    return read_cache(file, _WHAT, parse)
