"""Updates that adapters add to a weight, computed rows at a time in float32.

    Delta         LoRA: factor * B @ A
    Difference    whole differences (.diff, .diff_b, .w_norm, .b_norm): factor * D
    Hadamard      LoHa: factor * (W1a @ W1b) * (W2a @ W2b), element by element
    Kronecker     LoKr: factor * kron(W1, W2), each of them whole or a product of two
    Sum           several of these
Formulas are those of LyCORIS, in which LoHa and LoKr come from, and of PEFT.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import torch

from lowvram_quantize.source import TensorRef

Tensor = torch.Tensor

Adder = Callable[[Tensor, int], Tensor]
"""Adds in place to rows [count, width] in float32 that begin at that row of the weight, and returns them."""


class Update(abc.ABC):
    """What is added to one tensor of the base."""

    @property
    @abc.abstractmethod
    def factors(self) -> tuple[float, ...]: ...

    @property
    @abc.abstractmethod
    def ranks(self) -> tuple[int, ...]: ...

    @abc.abstractmethod
    def adder(self) -> Adder:
        """Reads what is small; what has the weight's own size is read with its rows."""


@dataclasses.dataclass(frozen=True)
class Delta(Update):
    """The sum of ``factor * B @ A`` with A [r, in] and B [out, r], of each LoRA."""

    a: TensorRef
    b: TensorRef
    factor: float
    more: tuple[Delta, ...] = ()

    @property
    def factors(self) -> tuple[float, ...]:
        return (self.factor, *(delta.factor for delta in self.more))

    @property
    def ranks(self) -> tuple[int, ...]:
        return (self.a.rows, *(delta.a.rows for delta in self.more))

    def load(self) -> tuple[Tensor, Tensor]:
        """(factor * B, A), float32; of several [out, sum of r] and [sum of r, in]."""
        a, b = self.a.read().float(), self.b.read().float().mul_(self.factor)  # as they lie in files, by name
        if not self.more:
            return b, a
        loaded = [(b, a), *(delta.load() for delta in self.more)]
        return torch.cat([b for b, _ in loaded], 1), torch.cat([a for _, a in loaded], 0)

    def adder(self) -> Adder:
        b, a = self.load()
        return lambda rows, start: rows.addmm_(b[start : start + len(rows)], a)


@dataclasses.dataclass(frozen=True)
class Difference(Update):
    """A tensor of the weight's own shape."""

    whole: TensorRef
    factor: float

    @property
    def factors(self) -> tuple[float, ...]:
        return (self.factor,)

    @property
    def ranks(self) -> tuple[int, ...]:
        return ()

    def adder(self) -> Adder:
        return lambda rows, start: rows.add_(self.whole.read_rows(start, len(rows)).float(), alpha=self.factor)


@dataclasses.dataclass(frozen=True)
class Hadamard(Update):
    """(``w1_a`` [out, r] @ ``w1_b`` [r, in]) * (``w2_a`` @ ``w2_b``)."""

    w1_a: TensorRef
    w1_b: TensorRef
    w2_a: TensorRef
    w2_b: TensorRef
    factor: float

    @property
    def factors(self) -> tuple[float, ...]:
        return (self.factor,)

    @property
    def ranks(self) -> tuple[int, ...]:
        return (self.w1_b.rows,)

    def adder(self) -> Adder:
        w1_a, w1_b, w2_a, w2_b = (ref.read().float() for ref in (self.w1_a, self.w1_b, self.w2_a, self.w2_b))

        def add(rows: Tensor, start: int) -> Tensor:
            own = slice(start, start + len(rows))
            return rows.addcmul_(w1_a[own] @ w1_b, w2_a[own] @ w2_b, value=self.factor)

        return add


@dataclasses.dataclass(frozen=True)
class Kronecker(Update):
    """kron of ``w1`` [p, q] and ``w2`` [s, t], each one tensor or the two of a product, for a weight [p * s, q * t]."""

    w1: tuple[TensorRef, ...]
    w2: tuple[TensorRef, ...]
    factor: float

    @property
    def factors(self) -> tuple[float, ...]:
        return (self.factor,)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({refs[1].rows for refs in (self.w1, self.w2) if len(refs) == 2}))

    def adder(self) -> Adder:
        w1, w2 = _product(self.w1).mul_(self.factor), _product(self.w2)

        def add(rows: Tensor, start: int) -> Tensor:
            own = torch.arange(start, start + len(rows))
            outer, inner = w1[own // len(w2)], w2[own % len(w2)]
            split = rows.view(len(rows), w1.shape[1], w2.shape[1])
            return split.addcmul_(outer[:, :, None], inner[:, None]).view_as(rows)

        return add


@dataclasses.dataclass(frozen=True)
class Sum(Update):
    """One after the other."""

    updates: tuple[Update, ...]

    @property
    def factors(self) -> tuple[float, ...]:
        return tuple(factor for update in self.updates for factor in update.factors)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(rank for update in self.updates for rank in update.ranks)

    def adder(self) -> Adder:
        adders = [update.adder() for update in self.updates]

        def add(rows: Tensor, start: int) -> Tensor:
            for one in adders:
                rows = one(rows, start)
            return rows

        return add


def added(first: Update | None, second: Update) -> Update:
    """Both; LoRAs become one product."""
    if first is None:
        return second
    if isinstance(first, Delta) and isinstance(second, Delta):
        return dataclasses.replace(first, more=(*first.more, second, *second.more))
    return Sum((*(first.updates if isinstance(first, Sum) else (first,)), second))


def _product(refs: tuple[TensorRef, ...]) -> Tensor:
    first, *others = (ref.read().float() for ref in refs)
    return first @ others[0] if others else first
