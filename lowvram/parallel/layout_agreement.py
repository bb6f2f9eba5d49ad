"""Layout that ranks agree on: options of several GPUs, checked before any rank starts; and, on GPUs, what follows from
the cards that all of them tell, for every rank by itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import psutil
import torch

from lowvram.devices import choose_dtype, cuda_is_here
from lowvram.offload.placement import MemoryOptions
from lowvram.parallel.rank_env import RankEnv
from lowvram.parallel.rank_team import RankTeam
from lowvram.planning.cards import Card, rates_from_json
from lowvram.planning.layout_choice import choose_team
from lowvram.planning.library_memory import parse_outside
from lowvram.planning.measure import CudaRunner, card_at_hand, contended_rates
from lowvram.planning.members import Machines
from lowvram.planning.rank_layout import LayoutOptions, ParallelLayout, chosen_layout
from lowvram.planning.workload import Workload
from lowvram.request import Request
from lowvram_kernels.errors import ConfigError
from lowvram_quantize.format import Artifact


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankOptions(LayoutOptions):
    """As they come from the command line; None leaves the choice to ``chosen_layout``."""

    gpus: int | None = None
    port: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus is not None and self.gpus < 1:
            raise ConfigError(f"--gpus is {self.gpus}; expected 1 or more")
        if self.port is not None and (self.gpus or 1) < 2:
            raise ConfigError("--port has an effect with --gpus 2 or more only; torchrun has --master-port")

    def layout(self, env: RankEnv | None, artifact: Artifact, sample_steps: int) -> ParallelLayout:
        """The layout of the ranks that were started, or are to be.

        Raises:
            ConfigError: the options do not fit them.
        """
        if env is not None and self.gpus not in (None, env.world_size):
            raise ConfigError(
                f"--gpus is {self.gpus}, but {env.world_size} ranks were started; leave --gpus out{env.hint}"
            )
        if env is not None and self.port not in (None, 0, env.port):
            raise ConfigError(f"--port is {self.port}, but the ranks were told {env.port}; leave --port out{env.hint}")
        world = env.world_size if env else self.gpus or 1
        if env is None and self.gpus is None and (self.num_gpus_dit or 1) + bool(self.enable_vae_parallel) > 1:
            wanted = (self.num_gpus_dit or 1) + bool(self.enable_vae_parallel)
            vae = " and one for the VAE" if self.enable_vae_parallel else ""
            raise ConfigError(
                f"--num_gpus_dit {self.num_gpus_dit or 1}{vae} needs {wanted} ranks, and one was started; add --gpus "
                f"{wanted}, or start them with torchrun --nproc_per_node={wanted} -m lowvram infer ..."
            )
        try:
            return chosen_layout(
                world, self, sample_steps=sample_steps, heads=artifact.component("dit").config["num_heads"]
            )
        except ConfigError as error:
            raise ConfigError(f"{error}{env.hint if env else ''}") from error


def check_for_ranks(layout: ParallelLayout, memory: MemoryOptions) -> None:
    """Raises: ConfigError for an option that means nothing to several ranks."""
    if layout.world_size > 1 and memory.allow_quality_loss:
        raise ConfigError("--allow-quality-loss begins a video again, which several ranks cannot; leave it out")


def check_gpus(device: str, ranks: int) -> None:
    """Raises: ConfigError where fewer GPUs are here than ranks are to be started."""
    if device == "cpu" or (device == "auto" and not cuda_is_here()):
        return
    if (count := torch.cuda.device_count()) < ranks:
        raise ConfigError(f"--gpus is {ranks}, but {count} GPUs are here; give --gpus {max(count, 1)} or --device cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutAgreement:
    """What the layout of a run on GPUs follows from, beside the cards."""

    options: RankOptions
    artifact: Artifact
    request: Request
    memory: MemoryOptions
    dtype: str

    def settle(self, team: RankTeam, device: torch.device) -> Machines | None:
        """Let the team take the layout that is predicted to be the fastest on what all ranks run on, which comes back;
        None on the CPU, where there is nothing to settle.

        Raises:
            OutOfMemoryError: no layout that was allowed fits.
        """
        if device.type != "cuda":
            return None
        there = machines_of(team, device, self.memory)
        if self.options.ulysses_size is None:
            team.settle(self._layout(there, choose_dtype(self.dtype, device)))
        return there

    def _layout(self, there: Machines, dtype: torch.dtype) -> ParallelLayout:
        # The portrait, which one rank reads, makes the size named here or less of it.
        request, options = self.request, self.options
        work = Workload.of_size(
            request.size, infer_frames=request.infer_frames, sample_steps=request.sample_steps, dtype=dtype
        )
        work = dataclasses.replace(work, voice_on_host=request.may_be_long)
        return choose_team(self.artifact, work, there, self.memory, options).layout


def machines_of(team: RankTeam, device: torch.device, memory: MemoryOptions) -> Machines:
    """What all ranks run on; every rank is told the same."""
    card = _card_in_turn(team, device)
    told = team.share(
        "cards",
        {
            "card": dataclasses.asdict(card),
            "vram": min(memory.vram_budget or card.usable_bytes, card.usable_bytes),
            "ram": memory.ram_budget or psutil.virtual_memory().available,
        },
    )
    names = list(dict.fromkeys(peer.machine for peer in team.peers))
    machines = [names.index(peer.machine) for peer in team.peers]
    return Machines(
        cards=[_card(facts["card"]) for facts in told],
        vram_bytes=[facts["vram"] for facts in told],
        machines=machines,
        ram_bytes=[min(f["ram"] for f, own in zip(told, machines, strict=True) if own == m) for m in range(len(names))],
    )


def _card_in_turn(team: RankTeam, device: torch.device) -> Card:
    """This rank's card. Its own rates, which single runs read too, are measured while no other card of the machine
    works; copies of a run on several are those that it reaches while all of them copy."""
    machines = [peer.machine for peer in team.peers]
    mine, here = machines[team.role.rank], max(machines.count(machine) for machine in machines)
    place = machines[: team.role.rank].count(mine)
    card: Card | None = None
    for turn in range(here):
        if turn == place:
            card = card_at_hand(device)
        team.share("turn", turn)
    assert card is not None
    if here == 1:
        return card
    rates = contended_rates(
        card.rates, machines.count(mine), CudaRunner(device), lambda known: all(team.share("contended", known))
    )
    return dataclasses.replace(card, rates=rates)


def _card(values: dict[str, Any]) -> Card:
    """From what ``dataclasses.asdict`` and JSON made of it."""
    outside, nccl = values["outside"], tuple((ranks, nbytes) for ranks, nbytes in values["nccl"])
    rates = rates_from_json(values["rates"])
    return Card(**values | {"rates": rates, "outside": outside and parse_outside(outside), "nccl": nccl})
