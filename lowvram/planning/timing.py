"""Timing: predicted seconds of one block, in the steady state from the second clip on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import get_args

from lowvram.offload.placement import Placement
from lowvram.planning.block_tasks import Copied, Lane, Task, tasks_of
from lowvram.planning.cards import LINK_BYTES_PER_S, Rates
from lowvram.planning.memory_costs import ring_costs, step_exchange, step_operations
from lowvram.planning.model_sizes import ModelSizes
from lowvram.planning.operation_rates import Bound
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
    """Seconds a block. ``arithmetic`` is what the card computes for the layers: products, and the passes and starts of
    kernels between them. Both ways over PCIe run at once, beside it, and so does what the ``host`` takes to ask for
    kernels; ``exchange``, for which attention waits, ``exposed`` and ``decode`` hide behind nothing."""

    arithmetic: float
    pcie: float
    exposed: float
    decode: float
    exchange: float = 0.0
    host: float = 0.0

    @classmethod
    def of(cls, tasks: Iterable[Task], bound: Bound = "expected") -> Seconds:
        """What the tasks take together.

        Kernels of a rank run one after the other in one stream, so that products, attention, and the passes between
        them are added. Inside a kernel the units of a card work at once: a Linear takes as long as its products or as
        reading its weights, attention as long as its products, its exponentials, its other instructions or reading its
        rings, whichever is longest. Copies and the host go on meanwhile.
        """
        lanes: dict[str, float] = dict.fromkeys(get_args(Lane), 0.0)
        for task in tasks:
            lanes[task.lane] += task.seconds(bound)
        linear = max(lanes["linear"], lanes["weights"])
        attention = max(lanes[name] for name in ("attention", "exp2", "instructions", "rings"))
        return cls(
            arithmetic=linear + attention + lanes["between"],
            pcie=max(lanes["in"], lanes["out"]),
            exposed=lanes["exposed"],
            decode=lanes["decode"],
            exchange=lanes["exchange"],
            host=lanes["host"],
        )

    @property
    def block(self) -> float:
        return max(self.arithmetic + self.exchange, self.pcie, self.host) + self.exposed + self.decode

    @property
    def limited_by(self) -> str:
        """What takes longest: "arithmetic", "exchange", "pcie", "launches"; "decode" where nothing else is done."""
        if not self.arithmetic:
            return "decode"
        card = self.arithmetic + self.exchange
        if card < max(self.pcie, self.host):
            return "pcie" if self.pcie >= self.host else "launches"
        return "arithmetic" if self.arithmetic >= self.exchange else "exchange"


def range_words(low: float, high: float) -> str:
    """ "1.42 to 2.01 s"."""
    return f"{low:.2f} to {high:.2f} s"


def slowest(every: Iterable[Seconds]) -> Seconds:
    """Of ranks that wait for each other in every layer: each part takes as long as it does on the slowest rank."""
    rows = [dataclasses.asdict(seconds) for seconds in every]
    return Seconds(**{name: max(row[name] for row in rows) for name in rows[0]})


def block_tasks(
    sizes: ModelSizes,
    work: Workload,
    placement: Placement,
    rates: Rates,
    share: Share,
    link_bytes_per_s: float = LINK_BYTES_PER_S,
    *,
    cuda_graphs: bool = False,
) -> list[Task]:
    """Everything that a rank does for a block."""
    bytes_ = traffic(sizes, work, placement, share)
    # A link that is no faster than PCIe is PCIe: what ranks exchange is in the way of what streams.
    beside = bytes_ if link_bytes_per_s <= rates.h2d else dataclasses.replace(bytes_, sent=0, received=0)
    copied = Copied(
        inwards=bytes_.h2d + beside.received,
        outwards=bytes_.d2h + beside.sent,
        exposed=bytes_.exposed,
        exchanged=max(bytes_.sent, bytes_.received),
        link_bytes_per_s=link_bytes_per_s,
    )
    return tasks_of(sizes, work, placement, rates, share, copied, cuda_graphs=cuda_graphs)


def seconds_of(
    sizes: ModelSizes,
    work: Workload,
    placement: Placement,
    rates: Rates,
    share: Share,
    link_bytes_per_s: float = LINK_BYTES_PER_S,
    *,
    cuda_graphs: bool = False,
) -> Seconds:
    """As expected, of the rates in ``operation_rates``."""
    return Seconds.of(block_tasks(sizes, work, placement, rates, share, link_bytes_per_s, cuda_graphs=cuda_graphs))


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
