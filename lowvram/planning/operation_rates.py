"""Rates per operation: what share of a card's peak each kind of work reaches, and what is counted of it, in one table.

A peak is a data sheet's (``card_table``) or what one large product or copy reached on the card itself
(``lowvram.planning.measure``); a share of the latter is larger, since less is lost from it. Every figure is three: the
least and the most that can be argued for, and what is expected, which is what plans are chosen by. Nothing here is
fitted to a wanted result; what ``lowvram selftest`` timed at the model's shapes takes the place of a share altogether.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

Bound = Literal["low", "expected", "high"]
"""Of seconds: "low" are those of the best rates."""
BOUNDS: tuple[Bound, ...] = ("low", "expected", "high")


@dataclasses.dataclass(frozen=True)
class Range:
    """A figure of work: ``least`` <= ``expected`` <= ``most``."""

    least: float
    expected: float
    most: float

    def for_seconds(self, bound: Bound, *, per_second: bool = True) -> float:
        """That of seconds' ``bound``: of what is done ``per_second`` the most makes the fewest seconds."""
        fast, slow = (self.most, self.least) if per_second else (self.least, self.most)
        return {"low": fast, "expected": self.expected, "high": slow}[bound]

    def times(self, factor: float) -> Range:
        return Range(self.least * factor, self.expected * factor, self.most * factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """``share`` of a data sheet's rate, ``on`` other ones by compute capability, ``of_measured`` of a rate that was
    measured on the card; None where that is no other. ``source`` is a word for tables, ``why`` the reasoning. Where
    ``per_second`` is False the figure is no share but a count or seconds apiece: the more, the slower."""

    share: Range
    source: str
    why: str
    on: Mapping[int, Range] = dataclasses.field(default_factory=dict)
    of_measured: Range | None = None
    per_second: bool = True

    def reached(self, generation: int | None, *, measured: bool) -> Range:
        if measured and self.of_measured is not None:
            return self.of_measured
        return self.on.get(generation or 0, self.share)

    def times(self, factor: float) -> Operation:
        """The same with every figure changed alike."""
        return dataclasses.replace(
            self,
            share=self.share.times(factor),
            on={sm: of.times(factor) for sm, of in self.on.items()},
            of_measured=self.of_measured and self.of_measured.times(factor),
        )


_OF_A_PRODUCT = Range(0.70, 0.85, 1.0)

OPERATION_RATES: dict[str, Operation] = {
    "int8 Linear": Operation(
        share=Range(0.55, 0.70, 0.85),
        on={90: Range(0.30, 0.45, 0.65), 100: Range(0.20, 0.35, 0.60)},
        of_measured=_OF_A_PRODUCT,
        source="assumed",
        why="good int8 products of 3168 x 5120 x 5120 and more reach 70 to 85 % of a data sheet on sm_80 to 89; ours "
        "are Triton's and have scales to apply, so the low end is expected. On sm_90 Triton waits for each int8 "
        "wgmma, and on sm_100 it has no fast path for int8",
    ),
    "fp8 Linear": Operation(
        share=Range(0.60, 0.75, 0.90),
        on={90: Range(0.40, 0.55, 0.70), 100: Range(0.30, 0.50, 0.70)},
        of_measured=_OF_A_PRODUCT,
        source="assumed",
        why="with float32 accumulation GeForce runs fp8 at half the rate of int8, which is easier to keep fed; cuBLAS "
        "with a scale a row is reported at 55 to 70 % on H100, whose power limit such products meet",
    ),
    "16 or 32 bit Linear": Operation(
        share=Range(0.75, 0.85, 0.95),
        on={80: Range(0.70, 0.80, 0.88), 90: Range(0.55, 0.68, 0.78), 100: Range(0.55, 0.68, 0.80)},
        of_measured=Range(0.85, 0.95, 1.0),
        source="assumed",
        why="cuBLAS at these shapes: 140 to 160 of the RTX 4090's 165 tera operations a second are commonly reported, "
        "250 to 275 of an A100's 312, 600 to 750 of an H100's 989 under its power limit",
    ),
    "int8 attention": Operation(
        share=Range(0.45, 0.60, 0.74),
        on={90: Range(0.20, 0.30, 0.45), 100: Range(0.15, 0.25, 0.45)},
        of_measured=Range(0.55, 0.72, 0.90),
        source="assumed",
        why="both products, q k and p v, in int8. SageAttention 2++ reports 489 of 660 tera operations a second on an "
        "RTX 4090 and 643 of 838 on an RTX 5090, hand-written: the most. SageAttention 2 reports about 900 of "
        "1979 on an H100 with asynchronous products, which Triton's in int8 are not",
    ),
    "16 or 32 bit attention": Operation(
        share=Range(0.70, 0.85, 0.95),
        on={80: Range(0.55, 0.65, 0.73), 90: Range(0.35, 0.50, 0.66), 100: Range(0.35, 0.50, 0.65)},
        of_measured=Range(0.60, 0.75, 0.90),
        source="assumed",
        why="FlashAttention 2 is reported near the data sheet of an RTX 4090, at 190 to 225 of an A100's 312 and 350 "
        "to 400 of an H100's 989 tera operations a second; cuDNN and FlashAttention 3 at up to 650 there",
    ),
    "exp2": Operation(
        share=Range(0.70, 0.85, 1.0),
        source="architecture",
        why="special function units: 16 an SM and clock on all of these chips; one exp2 a score of attention",
    ),
    "instructions of a score": Operation(
        share=Range(13, 13.4, 14.5),
        source="counted",
        per_second=False,
        why="of an int8 score, all but the products: read off the machine code of the inner loop, loads and addresses "
        "included (`lowvram_kernels.aot`; 973 a step less 128 products for 128 x 128 scores by 256 threads on sm_89, "
        "13.2 to 13.7 a score on sm_80 to 120)",
    ),
    "instructions of a 16 bit score": Operation(
        share=Range(5, 7, 10),
        source="assumed",
        per_second=False,
        why="as FlashAttention 2 has it, counted on paper and not in its machine code: scale less maximum, the "
        "maximum, sum, half a conversion; the accumulator is only rescaled",
    ),
    "instructions": Operation(
        share=Range(0.5, 0.7, 0.9),
        source="architecture",
        why="an SM starts four instructions of 32 threads a clock; products are started from the same slots, some "
        "operations have fewer units than that, and no code is without waits",
    ),
    "VAE convolution": Operation(
        share=Range(0.45, 0.60, 0.75),
        on={90: Range(0.30, 0.45, 0.60), 100: Range(0.25, 0.40, 0.55)},
        of_measured=Range(0.50, 0.65, 0.80),
        source="assumed",
        why="cuDNN's bf16 convolutions over channels-last activations are reported at 60 to 80 % with 192 and more "
        "channels; a third of the decoder's operations has 96, which fill three quarters of a tile. A rate that is "
        "as high as an H100's is reached less. Not measured here on any card",
    ),
    "own memory": Operation(
        share=Range(0.75, 0.88, 0.94),
        of_measured=Range(0.85, 0.95, 1.0),
        source="assumed",
        why="bandwidth tests reach 90 to 94 % of a data sheet; passes over rows of 5120 values that are longer than "
        "the cache a little less",
    ),
    "start of a kernel": Operation(
        share=Range(1e-6, 2e-6, 4e-6),
        source="assumed",
        per_second=False,
        why="seconds from the last block of one kernel to all of the next at work, in one stream",
    ),
    "launch by the host": Operation(
        share=Range(4e-5, 7.5e-5, 1.3e-4),
        source="counted",
        per_second=False,
        why="seconds of the host for a launch: `python benchmarks/host_time.py` counts 70 us of Python on an AMD "
        "EPYC, seconds of a block by launches of a block; about 5 more are the driver's",
    ),
    "replay by the host": Operation(
        share=Range(2e-5, 4e-5, 8e-5),
        source="assumed",
        per_second=False,
        why="seconds of the host for a layer that is a CUDA graph: starting 20 to 40 kernels at once takes the driver "
        "10 to 20 us, and copying into the lane as much in Python",
    ),
    "PCIe": Operation(
        share=Range(0.85, 1.0, 1.04),
        source="assumed",
        why="of what pinned copies of tens of MiB reach (25 GB/s over 16 lanes of PCIe 4.0, or what was measured)",
    ),
    "exchange": Operation(
        share=Range(0.5, 1.0, 2.0),
        source="assumed",
        why="of what ranks of a stage send each other, see LINK_BYTES_PER_S",
    ),
}


@dataclasses.dataclass(frozen=True)
class Known:
    """A rate or count that a row of seconds was made by, and where from."""

    figures: Range
    source: str
    per_second: bool

    def at(self, bound: Bound) -> float:
        return self.figures.for_seconds(bound, per_second=self.per_second)


def known(name: str, generation: int | None, *, measured: bool) -> Known:
    """What the table has of an operation. Raises: KeyError."""
    operation = OPERATION_RATES[name]
    from_card = measured and operation.of_measured is not None
    source = f"{operation.source} share of a measured rate" if from_card else operation.source
    return Known(operation.reached(generation, measured=measured), source, operation.per_second)
