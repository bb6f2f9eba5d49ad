"""Graphics cards as plans know them: memory and rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from lowvram.planning.library_memory import OutsideAllocator
from lowvram_kernels.chips import GENERATIONS

TERA, GIGA = 1e12, 1e9

# What a card sends to another while it receives as much. GeForce cards from the RTX 40 on have no way to each other but
# through host memory, where NCCL writes and reads again what a card with 16 lanes of PCIe 4.0 could carry at 25 GB/s.
# Not measured: a judgement, and said in every plan that depends on it. Cards with NVLink do far better.
LINK_BYTES_PER_S = 10 * GIGA


# Of these generations an SM has 64 float32 units, of all others 128. Special function units are 16 on every one, and
# instructions that are started in a clock those of 128 threads.
_WITH_FEW, _FEW_UNITS, _UNITS, _SPECIAL_UNITS, _STARTED = (60, 70, 75, 80), 64, 128, 16, 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Dense operations a second and bytes a second. ``fp8`` None: no FP8 units, fp8 weights are widened to what is
    computed in. ``fp32`` is IEEE's, without TF32. ``memory`` is what the card reads of its own, None where that is not
    known. ``generation`` is the compute capability without the dot, None where that is not known.

    What of them is reached is said in ``operation_rates``; ``timed`` has pairs of an operation named there and the
    operations a second that it did at the model's shapes on this card."""

    int8: float
    fp8: float | None
    bf16: float
    fp32: float
    h2d: float
    d2h: float
    measured: bool = False
    memory: float | None = None
    generation: int | None = None
    timed: tuple[tuple[str, float], ...] = ()

    @property
    def instructions(self) -> float:
        """That threads can be given in a second: an SM starts four of 32 threads a clock. A float32 unit does a
        multiplication and an addition in one."""
        clocks = self.fp32 / 2 / (_FEW_UNITS if self.generation in _WITH_FEW else _UNITS)
        return clocks * _STARTED

    @property
    def exp2(self) -> float:
        """A second, of the special function units."""
        return self.instructions * _SPECIAL_UNITS / _STARTED

    def of(self, scheme: str, dtype: torch.dtype) -> float:
        """Peak operations a second of Linears that are stored as ``scheme``, where the others compute in ``dtype``."""
        by_scheme = {"int8": self.int8, "fp8": self.fp8 or self.values(dtype)}
        return by_scheme.get(scheme, self.values(dtype))

    def values(self, dtype: torch.dtype) -> float:
        """Peak operations a second of what is not 8-bit."""
        return self.fp32 if dtype is torch.float32 else self.bf16


def rates_from_json(values: Mapping[str, Any]) -> Rates:
    """From what ``dataclasses.asdict`` and JSON made of them. Raises: TypeError or ValueError where it was not that."""
    timed = tuple((name, rate) for name, rate in values.get("timed", ()))
    return Rates(**{**values, "timed": timed})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """``usable_bytes`` is what a process of ours can allocate: without the CUDA context, and on cards that draw a
    desktop without that. ``outside`` is what was measured beside tensors, None where nothing was, and ``nccl`` has
    pairs of (ranks of a group, bytes that NCCL was seen to take for it). ``generation`` is the compute capability
    without the dot, None of a card that is here and was asked itself; ``said`` is what else a plan has to say of the
    card."""

    name: str
    vram_bytes: int
    usable_bytes: int
    rates: Rates
    outside: OutsideAllocator | None = None
    nccl: tuple[tuple[int, int], ...] = ()
    generation: int | None = None
    said: str = ""

    @property
    def has_fp8(self) -> bool:
        return self.rates.fp8 is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """What makes a plan for it less sure, or another one than its rates say."""
        notes = [self.said] if self.said else []
        if self.generation is None or self.generation in GENERATIONS:
            return tuple(notes)
        if self.generation < GENERATIONS[0]:
            notes.append(
                f"{self.name} has sm_{self.generation}, and sm_80 is the oldest that is supported: PyTorch's own "
                "kernels run, where it has code for the card, bf16 is emulated, and memory and seconds are guesses"
            )
        else:
            notes.append(
                f"{self.name} has sm_{self.generation}: kernels have no settings of their own for it and run with "
                "those of an RTX 30, slower than its rates say"
            )
        return tuple(notes)
