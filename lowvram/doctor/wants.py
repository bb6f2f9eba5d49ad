"""Wants of the model at hand from this machine, as the planner has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from lowvram.devices import choose_dtype
from lowvram.planning.card_names import DEFAULT_CARD, cards_called
from lowvram.planning.card_table import CARDS
from lowvram.planning.cards import Card
from lowvram.planning.layout_choice import choose_team
from lowvram.planning.members import Machines
from lowvram.planning.model_sizes import ModelSizes
from lowvram.planning.rank_plan import DoesNotFit, Plan
from lowvram.planning.workload import Workload

SIZE = "704*384"
_NO_LIMIT = 1 << 50
_FLOAT32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankWants:
    """Of one rank: bytes that its card has to have, bytes that a block copies to and from it, and the seconds that the
    card is busy beside those copies. ``name`` is "" where there is no other rank."""

    name: str
    vram_bytes: int
    bytes_in: int
    bytes_out: int
    busy_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wants:
    """Of a run of ``what``: ``ranks`` of each in order, ``host_bytes`` of all of them together, weights that several
    read counted once; ``pinned_bytes`` have to stay where they are, of the rank that has the most."""

    what: str
    ranks: tuple[RankWants, ...]
    host_bytes: int
    pinned_bytes: int
    artifact_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """A card's name, as CUDA gives it, and the bytes that may be taken of it."""

    gpu: str
    vram_bytes: int


def wants_of(sizes: ModelSizes, rooms: Sequence[Room | None], *, ram_bytes: int) -> Wants:
    """Plan for as many ranks as there are ``rooms``, each on a card, or on the processor (None), which keeps everything
    in host memory. Where nothing fits, the plans that come nearest say what is missing.

    Raises:
        ConfigError: no layout of so many ranks.
    """
    on_cpu = any(room is None for room in rooms)
    there = Machines(
        cards=[_card_like(room.gpu if room else DEFAULT_CARD) for room in rooms],
        vram_bytes=[room.vram_bytes if room else _NO_LIMIT for room in rooms],
        machines=[0] * len(rooms),
        ram_bytes=[_NO_LIMIT if on_cpu else ram_bytes],
    )
    try:
        dtype = choose_dtype("auto", torch.device("cpu" if on_cpu else "cuda"))
        team = choose_team(sizes, Workload.of_size(SIZE, dtype=dtype), there)
        ranks, host = team.ranks, team.host[0]
    except DoesNotFit as refused:
        ranks, host = refused.ranks, refused.host[0]
    # On the processor there is one memory, and what would lie on the device lies there too.
    beside = sum(plan.peak_vram_bytes - plan.reserve_bytes for plan in ranks) if on_cpu else 0
    return Wants(
        what=f"a DiT of {sizes.parameters / 1e9:.3g} billion weights in {sizes.precision} at {SIZE}",
        ranks=tuple(_of_rank(plan, on_cpu=on_cpu, alone=len(rooms) == 1) for plan in ranks),
        host_bytes=host.peak + beside,
        pinned_bytes=0 if on_cpu else max(_pinned(plan) for plan in ranks),
        artifact_bytes=_artifact_bytes(sizes),
    )


def _card_like(gpu: str) -> Card:
    """The card of the table that CUDA calls "NVIDIA GeForce RTX 3090 Ti", or the default one. Editions with more and
    with less memory have the same rates, or nearly so."""
    return next(iter(cards_called(gpu)), CARDS[DEFAULT_CARD])


def _of_rank(plan: Plan, *, on_cpu: bool, alone: bool) -> RankWants:
    seconds = plan.seconds
    return RankWants(
        name="" if alone else plan.share.role.name,
        vram_bytes=0 if on_cpu else plan.peak_vram_bytes,
        bytes_in=plan.traffic.h2d + plan.traffic.received,
        bytes_out=plan.traffic.d2h + plan.traffic.sent,
        busy_s=seconds.arithmetic + seconds.exchange if plan.share.denoises else seconds.decode,
    )


def _pinned(plan: Plan) -> int:
    return plan.host.pinned_weights + plan.host.pinned_rings + plan.host.pinned_cache


def _artifact_bytes(sizes: ModelSizes) -> int:
    return sizes.weight_bytes + sizes.text_bytes + sizes.vae_bytes + sizes.audio.parameters * _FLOAT32
