"""Placements of ranks that share a run: as fast as can be on every card, then lean enough for the machines' memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from lowvram.offload.placement import Placement
from lowvram.planning.cards import Card
from lowvram.planning.memory import MachineParts, host_parts, machine_parts
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.planning.rank_plan import Budgets
from lowvram.planning.search import Job, candidates, fastest, fewest_host_rings, least_placement
from lowvram.planning.timing import slowest
from lowvram_kernels.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machines:
    """What ranks run on: each rank's card, the bytes that it may take of it, and the index of its machine; and bytes of
    each machine's memory that its ranks may take together.

    ``grouped``: whether ``vram_bytes`` were told when NCCL had taken its part of the cards already.
    """

    cards: Sequence[Card]
    vram_bytes: Sequence[int]
    machines: Sequence[int]
    ram_bytes: Sequence[int]
    grouped: bool = False

    @property
    def gpus(self) -> int:
        return len(self.cards)

    def check(self, layout: ParallelLayout) -> None:
        """Raises: ConfigError where these are not the ranks of ``layout``."""
        counts = {"cards": len(self.cards), "budgets": len(self.vram_bytes), "machines": len(self.machines)}
        for name, count in counts.items():
            if count != layout.world_size:
                raise ConfigError(
                    f"{count} {name} for {layout.words()}; expected {layout.world_size}, one for each rank"
                )
        if set(self.machines) != set(range(len(self.ram_bytes))):
            raise ConfigError(
                f"ranks are on machines {sorted(set(self.machines))}, but memory is given of {len(self.ram_bytes)}; "
                "expected machines counted from 0, and the memory of each"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """One rank: its part, its card, what it may take of it, and its machine."""

    job: Job
    card: Card
    budgets: Budgets
    machine: int

    def fastest(self, wave: int) -> Placement | None:
        """With so many steps in a pass; None where nothing fits on the card."""
        found = list(candidates(dataclasses.replace(self.job, wave=wave), self.budgets.usable))
        return fastest(self.job, self.card.rates, found) if found else None

    def streaming(self, layers: int, wave: int) -> Placement | None:
        """With so many layers from the host, or none where that leaves no more rings there, and as few rings as the
        card allows; None where nothing fits on it."""
        if not self.job.share.denoises:
            return least_placement(self.job)
        found: list[tuple[int, int]] = []
        for count in {layers} if self.job.options.offload_model else {0, layers}:
            rings = fewest_host_rings(self.job, count, wave, self.budgets.usable)
            found += [] if rings is None else [(rings, count)]
        if not found:
            return None
        rings, count = min(found)
        return self.job.placement(count, rings, wave)

    def widened(self, placement: Placement) -> Placement:
        """The same, but with the VAE's 8-bit decoder widened once where the card has room for it. Nothing goes to the
        host for that: it spares a pass over weights a latent frame, and a layer's copy costs more."""
        wide = dataclasses.replace(placement, wide_vae=True)
        has_any = self.job.share.media and self.job.sizes.vae_decoder
        return wide if has_any and self.job.peak(wide) <= self.budgets.usable else placement

    @property
    def waves(self) -> Sequence[int]:
        """Of which one is to be taken."""
        return [self.job.wave] if self.job.wave else range(1, self._steps + 1)

    def with_wave(self, wave: int) -> Member:
        """Held to so many steps in a pass, or to all that run here."""
        return dataclasses.replace(self, job=dataclasses.replace(self.job, wave=min(wave, self._steps)))

    @property
    def _steps(self) -> int:
        return max(1, len(self.job.share.steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shortfall:
    """Nothing fits: on the card of a ``rank``, or in the memory of a ``machine``, with the leanest ``placements``."""

    placements: tuple[Placement, ...]
    rank: int | None = None
    machine: int | None = None


def settle(members: Sequence[Member], ram_bytes: Sequence[int]) -> tuple[Placement, ...] | Shortfall:
    """Placements of all ranks, in their order; the same for the same members.

    Each rank first takes what is fastest on its card. Where that is too much for a machine, all its ranks stream the
    same layers, which lie on the host once: each of them makes room for rings on every card. Every wave is tried then.
    """
    fast = _fastest_on_cards(members)
    if fast is None:
        return _too_large(members)
    found = _within(members, fast, ram_bytes)
    if found == tuple(fast) or members[0].job.wave:
        return found
    waves = range(1, max(len(member.waves) for member in members) + 1)
    others = [found, *(_with_wave(members, wave, ram_bytes) for wave in waves)]
    fitting = [each for each in others if isinstance(each, tuple)]
    return min(fitting, key=lambda placements: _rank(members, placements)) if fitting else others[1]


def _fastest_on_cards(members: Sequence[Member]) -> list[Placement] | None:
    placements: list[Placement] = []
    for _, group in itertools.groupby(members, key=lambda member: member.job.share.role.stage):
        found = _fastest_stage(list(group))
        if found is None:
            return None
        placements.extend(found)
    return placements


def _with_wave(members: Sequence[Member], wave: int, ram_bytes: Sequence[int]) -> tuple[Placement, ...] | Shortfall:
    """The same, with so many steps in a pass wherever there are so many."""
    settled = [member.with_wave(wave) for member in members]
    fast = _fastest_on_cards(settled)
    return _too_large(settled) if fast is None else _within(settled, fast, ram_bytes)


def _rank(members: Sequence[Member], placements: Sequence[Placement]) -> tuple[float, float, int]:
    """As ``fastest`` ranks those of one rank: of ranks that work at once, the slowest counts."""
    seconds = [m.job.seconds(p, m.card.rates) for m, p in zip(members, placements, strict=True)]
    most = max(placement.wave for placement in placements)
    return max(each.block for each in seconds), max(each.pcie for each in seconds), most


def _fastest_stage(group: Sequence[Member]) -> list[Placement] | None:
    """Of ranks that go through the layers together: the same wave for all."""
    options: list[tuple[tuple[float, float, int], list[Placement]]] = []
    for wave in group[0].waves:
        found = [member.fastest(wave) for member in group]
        placements = [placement for placement in found if placement is not None]
        if len(placements) == len(group):
            seconds = slowest(m.job.seconds(p, m.card.rates) for m, p in zip(group, placements, strict=True))
            options.append(((seconds.block, seconds.pcie, wave), placements))
    return min(options, key=lambda option: option[0])[1] if options else None


def _too_large(members: Sequence[Member]) -> Shortfall:
    least = tuple(least_placement(member.job) for member in members)
    over = [m.job.peak(placement) - m.budgets.usable for m, placement in zip(members, least, strict=True)]
    return Shortfall(placements=least, rank=over.index(max(over)))


def host_of(members: Sequence[Member], placements: Sequence[Placement]) -> MachineParts:
    """Host memory of the ranks of one machine."""
    pairs = list(zip(members, placements, strict=True))
    ranks = [
        host_parts(m.job.sizes, m.job.work, p, m.job.text_device, m.job.share, resident=m.job.options.resident)
        for m, p in pairs
    ]
    return machine_parts(members[0].job.sizes, ranks, [p.streamed_layers for p in placements])


def _within(
    members: Sequence[Member], placements: Sequence[Placement], ram_bytes: Sequence[int]
) -> tuple[Placement, ...] | Shortfall:
    """Placements that the machines have room for, from those that the cards have."""
    result = list(placements)
    for machine, there in enumerate(ram_bytes):
        places = [place for place, member in enumerate(members) if member.machine == machine]
        here = [members[place] for place in places]
        if not here or host_of(here, [result[place] for place in places]).peak <= there:
            continue
        lean = _lean(here, [result[place] for place in places], there)
        for place, placement in zip(places, lean, strict=True):
            result[place] = placement
        if host_of(here, lean).peak > there:
            return Shortfall(placements=tuple(result), machine=machine)
    return tuple(result)


def _lean(here: Sequence[Member], fast: Sequence[Placement], there: int) -> list[Placement]:
    """The fastest where all ranks of a machine stream the same layers; the leanest, or ``fast``, where none fits."""
    job, options = here[0].job, [list(fast)]
    for layers in [job.layers] if job.options.offload_model else range(job.layers + 1):
        found = [member.streaming(layers, each.wave) for member, each in zip(here, fast, strict=True)]
        placements = [placement for placement in found if placement is not None]
        if len(placements) == len(here):
            options.append(placements)

    return min(
        options, key=lambda placements: (max(0, host_of(here, placements).peak - there), _rank(here, placements))
    )
