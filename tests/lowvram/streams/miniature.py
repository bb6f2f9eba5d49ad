"""What a rollout and its decoder do with weights, rings and cache, in a few small operations: quick enough to be run
for each mutation. Order, waits and copies are the product's own; of the mathematics only the dependencies are left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lowvram.decode import DecoderBackup
from lowvram.denoise.kv_cache import Rings, RingShape
from lowvram.denoise.kv_format import kv_format
from lowvram.offload.copy_engine import Engine
from lowvram.offload.layers import Layers
from lowvram.offload.placement import Placement
from lowvram.schedule import Block, blocks_of, ticks
from lowvram_models.vae import DecoderState

Tensor = torch.Tensor
LAYERS, STEPS, CLIPS, HEADS, WIDTH = 4, 3, 3, 2, 4
FRAMES, FRAMES_PER_BLOCK, TOKENS_PER_FRAME = 5, 2, 3
CELLS = tuple((step, layer) for step in range(STEPS) for layer in range(LAYERS))
BLOCKS = CLIPS * 3


@dataclasses.dataclass(frozen=True)
class Spec:
    name: str
    dtype: torch.dtype


class Component:
    """Layers of a float32 and a bfloat16 tensor each: one is used where it lies, the other converted when bound."""

    def __init__(self) -> None:
        count = HEADS * WIDTH
        generator = torch.Generator().manual_seed(0)
        self._slabs = [
            torch.cat(
                [
                    torch.randn(count, generator=generator).view(torch.uint8),
                    torch.randn(count, generator=generator).bfloat16().view(torch.uint8),
                ]
            )
            for _ in range(LAYERS)
        ]

    def read_slab(self, slab: str) -> Tensor:
        return self._slabs[int(slab.rpartition(".")[2])]

    def slab_specs(self, slab: str) -> list[Spec]:
        return [Spec(name, view.dtype) for name, view in self.views(slab, self.read_slab(slab)).items()]

    def views(self, slab: str, buffer: Tensor) -> dict[str, Tensor]:
        at, layer = 4 * HEADS * WIDTH, f"layers.{slab.rpartition('.')[2]}"
        floats, halves = buffer[:at].view(torch.float32), buffer[at:].view(torch.bfloat16)
        return {f"{layer}.weight": floats.view(HEADS, WIDTH), f"{layer}.bias": halves.view(HEADS, WIDTH)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_layers=LAYERS)
        self.layers = nn.ModuleList(nn.Module() for _ in range(LAYERS))
        for layer in self.layers:
            for name in ("weight", "bias"):
                layer.register_parameter(name, nn.Parameter(torch.empty(HEADS, WIDTH, device="meta")))

    def layer(self, index: int, x_LNH: Tensor, seen: Tensor) -> Tensor:
        layer = self.layers[index]
        return torch.tanh(x_LNH * layer.weight + layer.bias + seen)


class Decoder:
    """Adds up all latents that it has seen, in slots that it replaces."""

    def __init__(self) -> None:
        self.state = DecoderState(slots=[torch.zeros(HEADS, WIDTH), "Rep", torch.zeros(HEADS, WIDTH)])

    def decode(self, latent: Tensor, fail: Callable[[], None]) -> Tensor:
        total, _, least = self.state.slots
        self.state.slots[0] = total + latent.mean(0)
        fail()
        self.state.slots[2] = torch.minimum(least, latent.amin(0))
        self.state.num_latents += 1
        return self.state.slots[0] - self.state.slots[2]


class Full(Exception):
    """Memory ran out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """``moves``: placements from a tick on, in the middle of its pass where it is negative. ``fails``: blocks whose
    decoding is done twice. ``ends`` after so many blocks, with copies under way."""

    start: Placement
    moves: dict[int, Placement] = dataclasses.field(default_factory=dict)
    fails: frozenset[int] = frozenset()
    ends: int | None = None
    decodes: bool = True


class Miniature:
    def __init__(self, engine: Engine, course: Course):
        self.engine, self.course = engine, course
        self.model, self.decoder = Model(), Decoder()
        component: Any = Component()
        self.layers = Layers(self.model, component, engine, torch.float32)  # type: ignore[arg-type]
        kind = kv_format(course.start.kv, HEADS, WIDTH, torch.float32)
        shape = RingShape.of(FRAMES, FRAMES_PER_BLOCK, TOKENS_PER_FRAME)
        self.rings = Rings(shape, kind, engine, range(STEPS), LAYERS)
        self.backup = DecoderBackup(engine, self.decoder)  # type: ignore[arg-type]
        self.place(course.start)
        if course.decodes:
            self.backup.save()

    def place(self, placement: Placement) -> None:
        self.layers.place(placement.streamed_layers, placement.weight_slots)
        self.rings.place(placement.host_rings, placement.ring_slots)

    def run(self) -> Tensor:
        """Everything that was denoised and decoded, and at last what the rings hold."""
        made: list[Tensor] = []
        flight: dict[int, Tensor] = {}
        for number, tick in enumerate(ticks(blocks_of(CLIPS, FRAMES, FRAMES_PER_BLOCK), STEPS, self.course.start.wave)):
            if tick.starts is not None:
                flight[tick.starts.index] = _noise(tick.starts)
            if number in self.course.moves:
                self.place(self.course.moves[number])
            if -number in self.course.moves and number:
                self._stopped(tick.items, flight)
                self.place(self.course.moves[-number])
            flight |= self._pass(tick.items, flight, LAYERS)
            block = tick.finished(STEPS)
            if block is not None:
                latent = flight.pop(block.index)
                made += [latent, self._decoded(block, latent)] if self.course.decodes else [latent]
                if self.course.ends == block.index:
                    return torch.cat([values.flatten() for values in made])
        rings = [values for cell in CELLS for values in self.rings.snapshot(*cell, torch.float32)]
        return torch.cat([values.flatten() for values in (*made, *rings)])

    def _stopped(self, items: Iterable[tuple[Block, int]], flight: dict[int, Tensor]) -> None:
        """A pass that memory ran out in, two layers in."""
        self._pass(items, flight, 2)

    def _pass(self, items: Iterable[tuple[Block, int]], flight: dict[int, Tensor], layers: int) -> dict[int, Tensor]:
        calls = [(block.index, step, self.rings.shape.window(block.clip, block.slot)) for block, step in items]
        x = {index: flight[index] for index, _, _ in calls}
        self.rings.expect(((step, layer), window) for layer in range(LAYERS) for _, step, window in calls)
        for layer in range(layers):
            self.layers.enter(layer)
            for index, step, window in calls:
                cell = (step, layer)
                slots = self.rings.open(cell)
                self.rings.kind.write(slots[window.slot][0], x[index], -x[index])
                read = [self.rings.kind.read(*slot, torch.float32) for slot in slots[: window.visible]]
                seen = torch.cat([keys + 2 * values for keys, values in read]).mean(0)
                self.rings.close(cell, window, slots)
                x[index] = self.model.layer(layer, x[index], seen)
            self.layers.leave(layer)
        return x

    def _decoded(self, block: Block, latent: Tensor) -> Tensor:
        failing = [block.index in self.course.fails]

        def fail() -> None:
            if failing.pop():
                failing.append(False)
                raise Full

        self.backup.before_decoding()
        try:
            out = self.decoder.decode(latent, fail)
        except Full:
            self.backup.restore()
            out = self.decoder.decode(latent, lambda: None)
        self.backup.save()
        return out


def _noise(block: Block) -> Tensor:
    generator = torch.Generator().manual_seed(block.index)
    return torch.randn(block.frames * TOKENS_PER_FRAME, HEADS, WIDTH, generator=generator)
