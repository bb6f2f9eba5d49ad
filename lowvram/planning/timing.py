"""Predicted seconds of one block, in the steady state from the second clip on."""

from __future__ import annotations

import dataclasses

from lowvram.placement import Placement
from lowvram.planning.cards import Rates
from lowvram.planning.costs import decode_operations, ring_costs, step_operations
from lowvram.planning.facts import ModelFacts
from lowvram.planning.workload import Workload
from lowvram.planning.workspace import decoder_cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes over PCIe for one block, each way, and of those the first, which hide behind nothing."""

    h2d: int
    d2h: int
    exposed: int

    @property
    def total(self) -> int:
        return self.h2d + self.d2h


def traffic(facts: ModelFacts, work: Workload, placement: Placement) -> Traffic:
    """A pass over the layers serves ``wave`` steps, so weights cross ``steps / wave`` times a block, rings once.

    Outwards goes also the decoder's cache, kept on the host in case that a block has to be decoded again.

    Copies go around the clock, except that a pass has to begin before its first ring is asked for: a ring's bytes are
    taken as exposed wherever anything streams.
    """
    weights = sum(facts.layer_bytes[index] for index in placement.streamed_layers)
    ring, rings = ring_costs(facts.config, work, placement.kv), len(placement.host_rings)
    return Traffic(
        h2d=weights * work.sample_steps // placement.wave + rings * ring.read,
        d2h=rings * ring.written + decoder_cache(facts.vae_base_dim, work),
        exposed=ring.read if rings or weights else 0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seconds:
    """Seconds a block. Both ways over PCIe run at once; ``exposed`` and ``decode`` hide behind nothing."""

    arithmetic: float
    pcie: float
    exposed: float
    decode: float

    @property
    def block(self) -> float:
        return max(self.arithmetic, self.pcie) + self.exposed + self.decode

    @property
    def limited_by(self) -> str:
        return "arithmetic" if self.arithmetic >= self.pcie else "pcie"


def seconds_of(facts: ModelFacts, work: Workload, placement: Placement, rates: Rates) -> Seconds:
    """Attention computes in bf16 whatever the rings are kept in."""
    step, share = step_operations(facts.config, work), rates.efficiency
    linear = step.linear / (rates.of(facts.precision) * share["linear"])
    attention = step.attention / (rates.bf16 * share["attention"])
    bytes_ = traffic(facts, work, placement)
    return Seconds(
        arithmetic=work.sample_steps * (linear + attention),
        pcie=max(bytes_.h2d / rates.h2d, bytes_.d2h / rates.d2h),
        exposed=bytes_.exposed / rates.h2d,
        decode=decode_operations(facts.vae_base_dim, work) / (rates.bf16 * share["vae"]),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What no plan can beat: a block's arithmetic at the full rate of int8 or bf16, attention and all, and int8 weights
    and rings over PCIe once."""

    int8_arithmetic_s: float
    bf16_arithmetic_s: float
    pcie_once_s: float


def limits(facts: ModelFacts, work: Workload, rates: Rates) -> Limits:
    step = step_operations(facts.config, work)
    operations = work.sample_steps * (step.linear + step.attention)
    ring = ring_costs(facts.config, work, "int8")
    return Limits(
        int8_arithmetic_s=operations / rates.int8,
        bf16_arithmetic_s=operations / rates.bf16,
        pcie_once_s=(facts.parameters + ring.cells * ring.payload) / rates.h2d,
    )
