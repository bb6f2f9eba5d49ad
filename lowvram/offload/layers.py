"""Layers of the DiT and where they are: on the device, or on the host and copied to it in one piece before they run.

On the host they lie in memory of this process, or in one copy for all ranks of a machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

import torch

from lowvram.loading.weights import bind, converted, unbind
from lowvram.offload.copy_engine import Engine
from lowvram.offload.prefetch import Fill, Moments, Prefetcher
from lowvram_models.dit import CausalDiT
from lowvram_quantize.format import Component

Tensor = torch.Tensor


class Shared(Protocol):
    def slab(self, index: int, content: Tensor) -> Tensor:
        """The machine's copy of ``content``, the bytes of layer ``index``; made first where nobody has done so yet."""
        ...


class HostCopies:
    """Ready to be copied from; ``shared`` None: in this process alone."""

    def __init__(self, engine: Engine, shared: Shared | None = None):
        self._engine, self._shared = engine, shared
        self._pinned: set[int] = set()

    def keep(self, index: int, mapped: Tensor) -> Tensor:
        """A layer's bytes, of a mapped file, ready to be copied from again and again."""
        if self._shared is None:
            return self._engine.keep_on_host(mapped)
        slab = self._shared.slab(index, mapped)
        if index not in self._pinned:
            self._engine.pin(slab)
            self._pinned.add(index)
        return slab


def layer_slab(index: int) -> str:
    return f"layer.{index}"


class Layers:
    """Makes a layer's weights present: every pass enters and leaves all layers in order.

    Resident layers are loaded once. Streamed ones lie on the host; the next of them are copied into staging slots
    while the ones before them run. What is stored in another dtype than ``dtype``, which is computed in, has a copy on
    the device: of a streamed layer while it runs. ``shared`` is where ranks of one machine keep those together.
    """

    def __init__(
        self, dit: CausalDiT, component: Component, engine: Engine, dtype: torch.dtype, shared: Shared | None = None
    ):
        self._dit, self._component, self._engine, self._dtype = dit, component, engine, dtype
        self._host = HostCopies(engine, shared)
        self._present: set[int] = set()
        self._on_host: dict[int, Tensor] = {}
        self._copied: dict[int, list[str]] = {}
        self._prefetcher = Prefetcher(engine, [])

    @property
    def count(self) -> int:
        return self._dit.config.num_layers

    def place(self, streamed: Collection[int], slots: int) -> None:
        """Keep ``streamed`` on the host and the others on the device; can be called again between two passes."""
        self._prefetcher = Prefetcher(self._engine, [])
        # Streamed layers are bound to slots of before, which would stay beside the new ones.
        for index in sorted(self._on_host.keys() | (self._present & set(streamed))):
            unbind(self._dit, [spec.name for spec in self._component.slab_specs(layer_slab(index))])
            self._present.discard(index)
        for index in sorted(set(range(self.count)) - self._present - set(streamed)):
            self._load(index)
        for index in sorted(set(streamed) - set(self._on_host)):
            self._on_host[index] = self._host.keep(index, self._read(index))
        self._on_host = {index: self._on_host[index] for index in sorted(streamed)}
        self._copied = {index: self._copied_names(index) for index in self._on_host}
        if self._on_host:
            nbytes = max(slab.numel() for slab in self._on_host.values())
            buffers = [torch.empty(nbytes, dtype=torch.uint8, device=self._engine.device) for _ in range(slots)]
            self._prefetcher = Prefetcher(self._engine, buffers)
            self._prefetcher.load(_jobs(self._engine, self._on_host))

    def resident(self, index: int) -> bool:
        """Whether the layer's weights stay where they are until the next ``place``."""
        return index in self._present

    def enter(self, index: int) -> None:
        """Make the layer's weights those of the model; what is computed from here on waits for them."""
        if index in self._on_host:
            slot = self._prefetcher.take(index)
            self._bind(index, slot[: self._on_host[index].numel()])

    def leave(self, index: int) -> None:
        """What was asked of the device so far is the last that reads the layer's weights in this pass."""
        if index in self._on_host:
            # They lie beside the slot: left bound, copies of all streamed layers would be there at once.
            unbind(self._dit, self._copied[index])
            self._prefetcher.release(index)

    def _load(self, index: int) -> None:
        source = self._read(index)
        slab = torch.empty(source.numel(), dtype=torch.uint8, device=self._engine.device)
        self._engine.wait(self._engine.copy_in(slab, source, self._engine.now()))
        self._bind(index, slab)
        self._present.add(index)

    def _read(self, index: int) -> Tensor:
        return self._component.read_slab(layer_slab(index))

    def _copied_names(self, index: int) -> list[str]:
        specs = self._component.slab_specs(layer_slab(index))
        return [spec.name for spec in specs if converted(spec.name, spec.dtype, self._dtype)]

    def _bind(self, index: int, slab: Tensor) -> None:
        bind(self._dit, self._component.views(layer_slab(index), slab), self._dtype)


def _jobs(engine: Engine, on_host: Mapping[int, Tensor]) -> Iterator[tuple[int, Fill]]:
    """Layers without an end. It knows no ``Layers``, which with its slots would only go when cycles are looked for."""
    for index in itertools.cycle(on_host):
        yield index, _fill(engine, on_host[index])


def _fill(engine: Engine, source: Tensor) -> Fill:
    def fill(slot: Tensor, after: Moments) -> Moments:
        return (engine.copy_in(slot[: source.numel()], source, *after),)

    return fill
