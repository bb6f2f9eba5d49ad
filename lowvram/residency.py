"""Where the DiT's layers are: all on the device, or copied there one slab at a time from the artifact."""

from __future__ import annotations

from typing import Protocol

import torch

from lowvram.weights import bind
from lowvram_models.dit import CausalDiT
from lowvram_quantize.format import Component

Tensor = torch.Tensor


def layer_slab(index: int) -> str:
    return f"layer.{index}"


class LayerStore(Protocol):
    """Makes a layer's weights present before it runs."""

    def fetch(self, index: int) -> None: ...


class Resident:
    """Every layer is loaded once and stays."""

    def __init__(self, dit: CausalDiT, component: Component, device: torch.device, dtype: torch.dtype):
        for index in range(dit.config.num_layers):
            slab = component.read_slab(layer_slab(index)).to(device)
            bind(dit, component.views(layer_slab(index), slab), dtype)

    def fetch(self, index: int) -> None:
        return None


class Streamed:
    """Layers live in the mapped artifact; each is copied in one piece into one of two staging slots before it runs.

    The copy is synchronous: nothing is overlapped yet, so this trades speed for memory.
    """

    def __init__(self, dit: CausalDiT, component: Component, device: torch.device, dtype: torch.dtype):
        self._dit, self._component, self._dtype = dit, component, dtype
        largest = max(component.slab_nbytes(layer_slab(i)) for i in range(dit.config.num_layers))
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self._held: list[int | None] = [None, None]

    def fetch(self, index: int) -> None:
        slot = index % 2
        if self._held[slot] == index:
            return
        name = layer_slab(index)
        source = self._component.read_slab(name)
        staged = self._slots[slot][: source.numel()]
        staged.copy_(source)
        bind(self._dit, self._component.views(name, staged), self._dtype)
        self._held[slot] = index
