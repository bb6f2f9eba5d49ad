"""On GPUs: every rank tells its card, and all of them come to the same layout and the same plan by themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

import psutil
import torch

from lowvram.parallel.layout import ParallelLayout
from lowvram.parallel.options import RankOptions
from lowvram.parallel.team import RankTeam
from lowvram.placement import MemoryOptions
from lowvram.planning.cards import Card, Rates
from lowvram.planning.choice import Machines, Wishes, choose_team
from lowvram.planning.measure import card_at_hand
from lowvram.planning.workload import Workload
from lowvram.request import Request
from lowvram_quantize.format import Artifact


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settler:
    """What the layout of a run on GPUs follows from, beside the cards."""

    options: RankOptions
    artifact: Artifact
    request: Request
    memory: MemoryOptions

    def settle(self, team: RankTeam, device: torch.device) -> None:
        """Tell the team what it runs on, and let it take the layout that is predicted to be the fastest there.

        Raises:
            OutOfMemoryError: no layout that was allowed fits.
        """
        if device.type != "cuda":
            return
        team.there = there = machines_of(team, device, self.memory)
        if self.options.ulysses_size is None:
            team.settle(self._layout(there))

    def _layout(self, there: Machines) -> ParallelLayout:
        # The portrait, which one rank reads, makes the size named here or less of it.
        work = Workload.of_size(
            self.request.size, infer_frames=self.request.infer_frames, sample_steps=self.request.sample_steps
        )
        options = self.options
        wishes = Wishes.of(self.memory, num_gpus_dit=options.num_gpus_dit, vae_rank=options.enable_vae_parallel)
        return choose_team(self.artifact, work, there, wishes).layout


def machines_of(team: RankTeam, device: torch.device, memory: MemoryOptions) -> Machines:
    """What all ranks run on; every rank is told the same."""
    card = card_at_hand(device)
    told = team.share(
        "cards",
        {
            "card": dataclasses.asdict(card),
            "vram": min(memory.vram_budget or card.usable_bytes, card.usable_bytes),
            "ram": memory.ram_budget or psutil.virtual_memory().available,
        },
    )
    names = list(dict.fromkeys(person.machine for person in team.people))
    machines = [names.index(person.machine) for person in team.people]
    return Machines(
        cards=[_card(facts["card"]) for facts in told],
        vram_bytes=[facts["vram"] for facts in told],
        machines=machines,
        ram_bytes=[min(f["ram"] for f, own in zip(told, machines, strict=True) if own == m) for m in range(len(names))],
    )


def _card(values: dict[str, Any]) -> Card:
    return Card(**values | {"rates": Rates(**values["rates"])})
