"""Timing: predicted seconds of one block, in the steady state from the second clip on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from lowvram.offload.placement import Placement
from lowvram.planning.cards import LINK_BYTES_PER_S, Rates
from lowvram.planning.memory_costs import decode_operations, ring_costs, rows_of, step_exchange, step_operations
from lowvram.planning.model_sizes import ModelSizes
from lowvram.planning.rank_layout import Share, whole
from lowvram.planning.workload import Workload
from lowvram.planning.workspace import decoder_cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes over PCIe for one block, each way, and of those the first, which hide behind nothing. ``sent`` and
    ``received`` go to and come from other ranks of the stage; latents between stages are too few to count."""

    h2d: int
    d2h: int
    exposed: int
    sent: int = 0
    received: int = 0

    @property
    def total(self) -> int:
        """Between host and device."""
        return self.h2d + self.d2h


def traffic(sizes: ModelSizes, work: Workload, placement: Placement, share: Share) -> Traffic:
    """A pass over the layers serves ``wave`` steps, so weights cross ``steps / wave`` times a block, rings once.

    Outwards goes also the decoder's cache, kept on the host in case that a block has to be decoded again.

    Copies go around the clock, except that a pass has to begin before its first ring is asked for: a ring's bytes are
    taken as exposed wherever anything streams.
    """
    weights, steps = sum(sizes.layer_bytes[index] for index in placement.streamed_layers), len(share.steps)
    ring, rings = ring_costs(sizes.config, work, placement.kv, share), len(placement.host_rings)
    exchanged = step_exchange(sizes.config, work, share)
    return Traffic(
        h2d=weights * steps // placement.wave + rings * ring.read,
        d2h=rings * ring.written + (decoder_cache(sizes.vae_base_dim, work) if share.media else 0),
        exposed=ring.read if rings or weights else 0,
        sent=steps * exchanged.sent,
        received=steps * exchanged.received,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seconds:
    """Seconds a block. Both ways over PCIe run at once, beside what the card computes; ``exchange``, for which
    attention waits, ``exposed`` and ``decode`` hide behind nothing."""

    arithmetic: float
    pcie: float
    exposed: float
    decode: float
    exchange: float = 0.0

    @property
    def block(self) -> float:
        return max(self.arithmetic + self.exchange, self.pcie) + self.exposed + self.decode

    @property
    def limited_by(self) -> str:
        """What takes longer: "arithmetic", "exchange" or "pcie", or "decode" where nothing else is done."""
        if not self.arithmetic:
            return "decode"
        if self.arithmetic + self.exchange < self.pcie:
            return "pcie"
        return "arithmetic" if self.arithmetic >= self.exchange else "exchange"


def slowest(every: Iterable[Seconds]) -> Seconds:
    """Of ranks that wait for each other in every layer: each part takes as long as it does on the slowest rank."""
    rows = [dataclasses.asdict(seconds) for seconds in every]
    return Seconds(**{name: max(row[name] for row in rows) for name in rows[0]})


def seconds_of(
    sizes: ModelSizes,
    work: Workload,
    placement: Placement,
    rates: Rates,
    share: Share,
    link_bytes_per_s: float = LINK_BYTES_PER_S,
) -> Seconds:
    """Attention over 8-bit rings computes in bf16 whatever is computed in around it. A step takes as long as the card
    computes, or as it reads weights and rings of its own memory, where that is longer."""
    step, reached = step_operations(sizes.config, work, share), rates.efficiency
    rows = rows_of(sizes.config, work, share)
    linear = sum(2 * of.weights * rows[of.rows] / rates.of(of.scheme, work.dtype) for of in sizes.linears)
    linear /= reached["linear"]
    attended = rates.bf16 if placement.kv == "int8" else rates.values(work.dtype)
    attention = step.attention / (attended * reached["attention"])
    decoding = decode_operations(sizes.vae_base_dim, work) / (rates.values(work.dtype) * reached["vae"])
    decode = decoding if share.media else 0.0
    reading = _read_bytes(sizes, work, placement, share) / rates.memory if rates.memory else 0.0
    bytes_ = traffic(sizes, work, placement, share)
    # A link that is no faster than PCIe is PCIe: what ranks exchange is in the way of what streams.
    beside = bytes_ if link_bytes_per_s <= rates.h2d else dataclasses.replace(bytes_, sent=0, received=0)
    return Seconds(
        arithmetic=len(share.steps) * max(linear + attention, reading),
        pcie=max((bytes_.h2d + beside.received) / rates.h2d, (bytes_.d2h + beside.sent) / rates.d2h),
        exposed=bytes_.exposed / rates.h2d,
        decode=decode,
        exchange=max(bytes_.sent, bytes_.received) / link_bytes_per_s,
    )


def _read_bytes(sizes: ModelSizes, work: Workload, placement: Placement, share: Share) -> int:
    """What one step reads of the card's memory at the least: every layer's weights and ring once."""
    if not share.denoises:
        return 0
    ring = ring_costs(sizes.config, work, placement.kv, share)
    return sum(sizes.layer_bytes) + sizes.config.num_layers * (ring.payload + ring.scales)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What no plan for one card can beat: a block's arithmetic at the full rate of int8 or bf16, attention and all, and
    int8 weights and rings over PCIe once."""

    int8_arithmetic_s: float
    bf16_arithmetic_s: float
    pcie_once_s: float


def limits(sizes: ModelSizes, work: Workload, rates: Rates) -> Limits:
    share = whole(sizes.config, work)
    step = step_operations(sizes.config, work, share)
    operations = work.sample_steps * (step.linear + step.attention)
    ring = ring_costs(sizes.config, work, "int8", share)
    return Limits(
        int8_arithmetic_s=operations / rates.int8,
        bf16_arithmetic_s=operations / rates.bf16,
        pcie_once_s=(sizes.parameters + ring.cells * ring.payload) / rates.h2d,
    )
