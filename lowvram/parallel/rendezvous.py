"""Rendezvous: a store that all ranks of a run reach, and what they tell each other through it."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError

from lowvram.parallel.rank_env import RankEnv
from lowvram_kernels.errors import DistributedError

RENDEZVOUS_S = 60
_POLL_S = 0.02
GONE = "gone"
"""Where the starter leaves word of a rank that has ended."""


class Rendezvous:
    """One rank's connection to the store. A starter that keeps the store itself says so in torchrun's way; without
    one, rank 0 keeps it.

    Raises:
        DistributedError: the store is out of reach, or its port is taken.
    """

    def __init__(self, env: RankEnv):
        self.env = env
        starter = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.store = self._connect(keeps=env.rank == 0 and not starter)
        self._told = 0

    def gone(self) -> str | None:
        """What the starter says of a rank that has ended badly: nobody else knows before all have met."""
        return self.store.get(GONE).decode() if self.store.check([GONE]) else None

    def another_connection(self) -> Store:
        """For another thread: a connection answers one question at a time."""
        return self._connect(keeps=False)

    def tell(
        self, what: str, value: Any, *, cause: Callable[[], str | None] = lambda: None, within_s: float = float("inf")
    ) -> list[Any]:
        """Tell the others ``value``, of which JSON has to be able; all ranks' values, in order, once they have told.

        Raises:
            DistributedError: there is a ``cause`` to wait no longer, or the others did not come in time.
        """
        self._told += 1
        keys = [f"told/{self._told}/{what}/{rank}" for rank in range(self.env.world_size)]
        self.store.set(keys[self.env.rank], json.dumps(value))
        begin = time.monotonic()
        while not self.store.check(keys):
            if (found := cause()) is not None:
                raise DistributedError(f"the run ended: {found}")
            if time.monotonic() - begin > within_s:
                missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
                raise DistributedError(
                    f"ranks {missing} of {self.env.world_size} did not come within {within_s:.0f} s; start as many as "
                    f"the layout has, all with the same address and port{self.env.hint}"
                )
            time.sleep(_POLL_S)
        return [json.loads(self.store.get(key)) for key in keys]

    def _connect(self, *, keeps: bool) -> Store:
        env, patience = self.env, datetime.timedelta(seconds=RENDEZVOUS_S)
        try:
            store = TCPStore(env.address, env.port, is_master=keeps, timeout=patience, wait_for_workers=False)
        except (DistError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            advice = "it is taken: give another" if keeps else "check that rank 0 runs there and that the port is open"
            raise DistributedError(
                f"rank {env.rank} cannot meet the others at {env.address} port {env.port} ({reason[:200]}); {advice}"
                f"{env.hint}"
            ) from error
        return PrefixStore(prefix(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), store)


def prefix(attempt: str) -> str:
    """What all keys of a run begin with."""
    return f"lowvram/{attempt}"
