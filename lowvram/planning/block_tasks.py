"""Tasks of a block: everything that one rank does for it in the steady state, how much of it, and at which rate.

Tasks of one lane follow each other. Which lanes run at once is said once, in ``timing.Seconds``' ``of``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from lowvram.offload.placement import Placement
from lowvram.planning.activation_passes import decode_pass_bytes, launches, pass_bytes
from lowvram.planning.cards import Rates
from lowvram.planning.memory_costs import decode_operations, ring_costs, rows_of, step_operations
from lowvram.planning.model_sizes import ModelSizes
from lowvram.planning.operation_rates import Bound, Known, Range, known
from lowvram.planning.rank_layout import Share
from lowvram.planning.workload import Workload

Lane = Literal[
    "linear", "weights", "attention", "exp2", "instructions", "rings", "between", "exchange", "in", "out", "host",
    "exposed", "decode",
]  # fmt: skip
_MEASURED = Range(0.9, 1.0, 1.05)
"""Of what an operation reached when it was timed alone at the model's shapes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """``amount`` of something, of which ``peak`` are done in a second at the most; ``reached`` is the share of that,
    or, where it is none, seconds (of ``peak`` 1) apiece. Each of the amount may take ``each`` units of what is done."""

    name: str
    lane: Lane
    amount: float
    peak: float
    reached: Known
    each: Known | None = None

    def seconds(self, bound: Bound) -> float:
        if not self.amount:
            return 0.0
        amount = self.amount * (self.each.at(bound) if self.each else 1.0)
        figure = self.reached.at(bound)
        return amount / (self.peak * figure) if self.reached.per_second else amount * figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copied:
    """Bytes of a block over PCIe ``inwards`` and ``outwards``, of which ``exposed`` hide behind nothing, and over the
    ``link`` between ranks, which does so many a second."""

    inwards: int
    outwards: int
    exposed: int
    exchanged: int
    link_bytes_per_s: float


@dataclasses.dataclass(frozen=True)
class _Table:
    """The table's entries for a card."""

    rates: Rates

    def of(self, name: str) -> Known:
        return known(name, self.rates.generation, measured=self.rates.measured)

    def operation(self, name: str, peak: float) -> tuple[float, Known]:
        """(operations a second, share of them): what was timed on the card where it was."""
        timed = dict(self.rates.timed).get(name)
        if timed is not None:
            return timed, Known(_MEASURED, "timed by selftest", True)
        return peak, self.of(name)


def tasks_of(
    sizes: ModelSizes,
    work: Workload,
    placement: Placement,
    rates: Rates,
    share: Share,
    copied: Copied,
    *,
    cuda_graphs: bool = False,
) -> list[Task]:
    """Of one rank; none with nothing to do."""
    table = _Table(rates)
    tasks = [
        *_linears(sizes, work, rates, share, table),
        *_attention(sizes, work, placement, rates, share, table),
        *_memory(sizes, work, placement, rates, share, table),
        *_host(sizes, placement, share, table, cuda_graphs=cuda_graphs),
        *_copies(copied, rates, table),
    ]
    if share.media:
        tasks += _decoding(sizes, work, rates, table)
    return [task for task in tasks if task.amount]


def _decoding(sizes: ModelSizes, work: Workload, rates: Rates, table: _Table) -> Iterator[Task]:
    amount = decode_operations(sizes.vae_base_dim, work)
    peak, reached = table.operation("VAE convolution", rates.values(work.dtype))
    yield Task(name="decoding, convolutions", lane="decode", amount=amount, peak=peak, reached=reached)
    if rates.memory:
        moved, reached = decode_pass_bytes(sizes.vae_base_dim, work), table.of("own memory")
        yield Task(name="decoding, passes", lane="decode", amount=moved, peak=rates.memory, reached=reached)


_WIDE_LINEAR, _WIDE_ATTENTION = "16 or 32 bit Linear", "16 or 32 bit attention"


def _linears(sizes: ModelSizes, work: Workload, rates: Rates, share: Share, table: _Table) -> Iterator[Task]:
    rows, steps = rows_of(sizes.config, work, share), len(share.steps)
    amounts: dict[str, int] = {}
    for of in sizes.linears:
        amounts[of.scheme] = amounts.get(of.scheme, 0) + steps * 2 * of.weights * rows[of.rows]
    for scheme, amount in amounts.items():
        narrow = scheme == "int8" or (scheme == "fp8" and rates.fp8 is not None)
        key = f"{scheme} Linear" if narrow else _WIDE_LINEAR
        peak, reached = table.operation(key, rates.of(scheme, work.dtype))
        yield Task(name=f"Linears, {scheme}", lane="linear", amount=amount, peak=peak, reached=reached)


def _attention(
    sizes: ModelSizes, work: Workload, placement: Placement, rates: Rates, share: Share, table: _Table
) -> Iterator[Task]:
    """Both products over rings in int8 where those are; otherwise, and to text and voice, what is computed in."""
    steps, int8 = len(share.steps), placement.kv == "int8"
    if not share.denoises:
        return
    every = steps * step_operations(sizes.config, work, share).attention
    keys = work.ring_tokens + work.sink_tokens
    scores = steps * sizes.config.num_layers * share.heads * work.block_tokens * keys
    product = 2 * sizes.config.head_dim * scores
    key, peak = ("int8 attention", rates.int8) if int8 else (_WIDE_ATTENTION, rates.values(work.dtype))
    peak, reached = table.operation(key, peak)
    format_ = "int8" if int8 else work.dtype_name
    for name in ("q k", "p v"):
        yield Task(name=f"attention, {name}, {format_}", lane="attention", amount=product, peak=peak, reached=reached)
    yield Task(name="attention, exp2 of scores", lane="exp2", amount=scores, peak=rates.exp2, reached=table.of("exp2"))
    yield Task(
        name="attention, other work on scores",
        lane="instructions",
        amount=scores,
        peak=rates.instructions,
        reached=table.of("instructions"),
        each=table.of("instructions of a score" if int8 else "instructions of a 16 bit score"),
    )
    peak, reached = table.operation(_WIDE_ATTENTION, rates.values(work.dtype))
    yield Task(
        name="attention to text and voice", lane="between", amount=every - 2 * product, peak=peak, reached=reached
    )


def _memory(
    sizes: ModelSizes, work: Workload, placement: Placement, rates: Rates, share: Share, table: _Table
) -> Iterator[Task]:
    """What is read and written of the card's own memory; nothing is known of it on some cards."""
    if not rates.memory or not share.denoises:
        return
    steps, ring = len(share.steps), ring_costs(sizes.config, work, placement.kv, share)
    passes = pass_bytes(sizes.config, work, share, placement.kv, eight_bit=sizes.quantized)
    layers = sizes.config.num_layers
    each: list[tuple[str, Lane, int]] = [
        ("reading weights", "weights", sum(sizes.layer_bytes)),
        ("reading rings", "rings", layers * (ring.payload + ring.scales)),
        ("quantizing, norms, residuals", "between", passes.between),
        ("queries, keys, values to rings", "between", passes.rings),
    ]
    reached = table.of("own memory")
    for name, lane, nbytes in each:
        yield Task(name=name, lane=lane, amount=steps * nbytes, peak=rates.memory, reached=reached)


def _host(sizes: ModelSizes, placement: Placement, share: Share, table: _Table, *, cuda_graphs: bool) -> Iterator[Task]:
    config, steps = sizes.config, len(share.steps)
    started = launches(config, placement.kv, steps)
    replayed = 0
    if cuda_graphs:
        streamed, hosted = set(placement.streamed_layers), set(placement.host_rings)
        calls = ((step, layer) for step in share.steps for layer in range(config.num_layers))
        replayed = sum(layer not in streamed and (step, layer) not in hosted for step, layer in calls)
    asked = launches(config, placement.kv, steps, replayed)
    each: list[tuple[str, Lane, int, str]] = [
        ("kernels' starts", "between", started, "start of a kernel"),
        ("host, launches", "host", asked, "launch by the host"),
        ("host, replays of layers", "host", replayed, "replay by the host"),
    ]
    for name, lane, amount, key in each:
        yield Task(name=name, lane=lane, amount=amount, peak=1.0, reached=table.of(key))


def _copies(copied: Copied, rates: Rates, table: _Table) -> Iterator[Task]:
    pcie, link = table.of("PCIe"), table.of("exchange")
    each: list[tuple[str, Lane, int, float, Known]] = [
        ("exchange between ranks", "exchange", copied.exchanged, copied.link_bytes_per_s, link),
        ("PCIe, in", "in", copied.inwards, rates.h2d, pcie),
        ("PCIe, out", "out", copied.outwards, rates.d2h, pcie),
        ("copies that hide behind nothing", "exposed", copied.exposed, rates.h2d, pcie),
    ]
    for name, lane, amount, peak, reached in each:
        yield Task(name=name, lane=lane, amount=amount, peak=peak, reached=reached)
