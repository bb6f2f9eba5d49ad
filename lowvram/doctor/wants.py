"""What the model at hand would want of this machine, from the planner."""

from __future__ import annotations

import dataclasses

from lowvram.planning.cards import CARDS, Card
from lowvram.planning.command import DEFAULT_CARD
from lowvram.planning.facts import ModelFacts
from lowvram.planning.layout import HOST_BASE_BYTES
from lowvram.planning.planner import DoesNotFit, Plan, plan
from lowvram.planning.workload import Workload

SIZE = "704*384"
_NO_LIMIT = 1 << 50
_FLOAT32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wants:
    """Bytes and seconds of one block of ``what``.

    ``vram_bytes`` is what one card has to have, ``host_bytes`` what all ranks of the machine take together at most;
    ``shared_bytes`` of it are weights that all ranks read, ``pinned_bytes`` have to stay where they are.
    """

    what: str
    vram_bytes: int
    host_bytes: int
    shared_bytes: int
    pinned_bytes: int
    artifact_bytes: int
    bytes_in: int
    bytes_out: int
    arithmetic_s: float


def wants_of(
    facts: ModelFacts, *, vram_bytes: int | None, ram_bytes: int, ranks: int, gpu: str = DEFAULT_CARD
) -> Wants:
    """Plan for one card with ``vram_bytes``, or for the processor (None), which keeps everything in host memory.
    ``gpu`` is the card's name, as CUDA gives it.

    Where nothing fits, the plan that comes nearest says what is missing. Several ranks share weights and divide the
    rings of one, so they take no more host memory than one does, but for the processes themselves.
    """
    work = Workload.of_size(SIZE)
    card = _card_like(gpu)
    vram = _NO_LIMIT if vram_bytes is None else vram_bytes
    ram = _NO_LIMIT if vram_bytes is None else ram_bytes - (ranks - 1) * HOST_BASE_BYTES
    try:
        found = plan(facts, work, vram_bytes=vram, ram_bytes=ram, card=card)
    except DoesNotFit as refused:
        found = refused.plan
    return _from_plan(facts, found, on_cpu=vram_bytes is None, ranks=ranks)


def _card_like(gpu: str) -> Card:
    """The card of the table whose name is in "NVIDIA GeForce RTX 3090 Ti", or the default one."""
    name = gpu.lower().replace(" ", "")
    return next((card for key, card in CARDS.items() if key in name), CARDS[DEFAULT_CARD])


def _from_plan(facts: ModelFacts, found: Plan, *, on_cpu: bool, ranks: int) -> Wants:
    host = found.peak_host_bytes + (ranks - 1) * HOST_BASE_BYTES
    pinned = found.host.pinned_weights + found.host.pinned_rings + found.host.pinned_cache
    return Wants(
        what=f"a DiT of {facts.parameters / 1e9:.3g} billion weights in {facts.precision} at {SIZE}",
        vram_bytes=0 if on_cpu else found.peak_vram_bytes,
        # On the processor there is one memory, and what would lie on the device lies there too.
        host_bytes=host + found.peak_vram_bytes - found.reserve_bytes if on_cpu else host,
        shared_bytes=found.host.pinned_weights,
        pinned_bytes=0 if on_cpu else pinned,
        artifact_bytes=_artifact_bytes(facts),
        bytes_in=found.traffic.h2d,
        bytes_out=found.traffic.d2h,
        arithmetic_s=found.seconds.arithmetic,
    )


def _artifact_bytes(facts: ModelFacts) -> int:
    return facts.weight_bytes + facts.text_bytes + facts.vae_bytes + facts.audio.parameters * _FLOAT32
