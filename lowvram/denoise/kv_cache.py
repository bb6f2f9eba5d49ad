"""KV cache of self-attention: a KV ring for each denoising step, and the sink that all steps share.

Both implement ``lowvram_models.attention.AttentionMemory``. Shapes: L tokens, N heads, H head_dim.
Source: model-spec section 3 (rings, sink) and 5 (RoPE of the condition keys at reading).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch

from lowvram.denoise.kv_format import Bytes, KVFormat, Own
from lowvram.offload.copy_engine import Engine
from lowvram.offload.events import DONE, Moment
from lowvram.offload.prefetch import Fill, Moments, Prefetcher
from lowvram_kernels.attention import attention
from lowvram_kernels.ring_codec import KVBlock
from lowvram_kernels.rounding import round_up
from lowvram_models.attention import Heads
from lowvram_models.rope import Rope, apply_rope

Tensor = torch.Tensor

_ALIGNMENT = 16
Cell = tuple[int, int]
"""(step, layer): one ring of one layer."""


class Sink:
    """Keys (normalised, before RoPE) and values of the condition tokens, a block for each layer, on the device."""

    def __init__(self, kind: KVFormat, layers: int, tokens: int, device: torch.device):
        self._kind, self.tokens = kind, tokens
        self._all = torch.empty(layers, round_up(kind.nbytes(tokens), _ALIGNMENT), dtype=torch.uint8, device=device)
        self._blocks = self._all.unbind(0)
        self.rotated: KVBlock | None = None
        """Where a layer's rotated keys stand while they are read; see ``keep_rotated``."""

    def block(self, layer: int) -> Bytes:
        return self._blocks[layer], self.tokens

    def keep_rotated(self) -> None:
        """From now on rotated keys stand at one address, as far as addresses matter: all layers take turns there."""
        self.rotated = self._kind.room_for_keys(self.block(0))

    @property
    def content(self) -> Tensor:
        """All keys and values, uint8 [layers, bytes a layer], on the device; to be read, or copied to."""
        return self._all

    def recorder(self, layer: int) -> SinkRecorder:
        return SinkRecorder(self, layer)

    def write(self, layer: int, k_LNH: Tensor, v_LNH: Tensor) -> None:
        self._kind.write(self._blocks[layer], k_LNH, v_LNH)

    def read(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A layer's keys (before RoPE) and values [tokens, N, H]."""
        return self._kind.read(self._blocks[layer], self.tokens, dtype)


@dataclasses.dataclass(frozen=True)
class SinkRecorder:
    """Memory of the sink pass: keeps a layer's keys and values, attends among the condition tokens."""

    sink: Sink
    layer: int

    def attend(self, queries: Heads, keys: Heads, v_LNH: Tensor, rope: Rope) -> Tensor:
        k_LNH = keys(None)
        self.sink.write(self.layer, k_LNH, v_LNH)
        return attention(queries(rope), apply_rope(k_LNH, rope), v_LNH)


@dataclasses.dataclass(frozen=True)
class Window:
    """Where a block stands in a ring: it is written to ``slot`` and sees the slots [0, ``visible``)."""

    slot: int
    visible: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingShape:
    """A ring holds one clip, a slot for each of its blocks; ``slots`` are their tokens (the last may have fewer)."""

    slots: tuple[int, ...]

    @classmethod
    def of(cls, frames_per_clip: int, frames_per_block: int, tokens_per_frame: int) -> RingShape:
        starts = range(0, frames_per_clip, frames_per_block)
        frames = [min(frames_per_block, frames_per_clip - start) for start in starts]
        return cls(slots=tuple(f * tokens_per_frame for f in frames))

    @property
    def capacity(self) -> int:
        return sum(self.slots)

    def window(self, clip: int, slot: int) -> Window:
        """Window of a block: in the first clip it sees what was written, from the second on the whole ring."""
        return Window(slot, slot + 1 if clip == 0 else len(self.slots))


class Rings:
    """The rings of all steps and layers: some on the device, the others on the host with a staged copy while in use.

    A cell lies in one stretch of bytes, slot behind slot. From the host, the slots that a block sees are copied in
    ahead of their use; only the block's own slot is copied out again. ``steps`` are those that run here.
    """

    def __init__(self, shape: RingShape, kind: KVFormat, engine: Engine, steps: Sequence[int], layers: int):
        self.shape, self.kind, self._engine = shape, kind, engine
        self._slot_nbytes = round_up(kind.nbytes(max(shape.slots)), _ALIGNMENT)
        self._all = [(step, layer) for step in steps for layer in range(layers)]
        self._device: dict[Cell, Tensor] = {}
        self._host: dict[Cell, Tensor] = {}
        self._written: dict[Cell, Moment] = {}
        self._prefetcher = Prefetcher(engine, [])
        # Slots of each slab, by its id: as long as the slabs stay, until the next ``place``.
        self._cut: dict[int, list[Bytes]] = {}

    @property
    def cell_nbytes(self) -> int:
        return self._slot_nbytes * len(self.shape.slots)

    def nbytes(self) -> int:
        return self.cell_nbytes * len(self._all)

    def place(self, on_host: Collection[Cell], staging: int) -> None:
        """Keep the cells ``on_host`` there and the others on the device; what they hold moves with them."""
        self._prefetcher = Prefetcher(self._engine, [])
        self._cut.clear()
        for cell in sorted(set(on_host) - set(self._host)):
            self._host[cell] = self._engine.host_buffer(self.cell_nbytes)
            held = self._device.pop(cell, None)
            if held is not None:
                # What held it is used again, and computations that come later stand before its way back.
                self._engine.wait(self._engine.copy_out(self._host[cell], held, self._engine.now()))
        for cell in (c for c in self._all if c not in self._host and c not in self._device):
            self._device[cell] = torch.empty(self.cell_nbytes, dtype=torch.uint8, device=self._engine.device)
        if self._host:
            device = self._engine.device
            slots = [torch.empty(self.cell_nbytes, dtype=torch.uint8, device=device) for _ in range(staging)]
            self._prefetcher = Prefetcher(self._engine, slots)

    def let_go(self) -> list[Tensor]:
        """Forget all that is held; the host's memory of it, which nothing copies from or to any more."""
        self._engine.settle()
        there = list(self._host.values())
        self._prefetcher = Prefetcher(self._engine, [])
        for held in (self._host, self._device, self._written, self._cut):
            held.clear()
        return there

    def content(self, cell: Cell) -> Tensor:
        """All keys and values of a cell, uint8, where they lie: on the device or on the host; to be read, or copied to,
        between two passes."""
        self._engine.settle()
        return self._host[cell] if cell in self._host else self._device[cell]

    def on_device(self, cell: Cell) -> bool:
        return cell in self._device

    def expect(self, cells: Iterable[tuple[Cell, Window]]) -> None:
        """Say which cells the coming pass uses, in order, so that those on the host are on their way in time."""
        if self._host:
            self._prefetcher.load(self._jobs(list(cells)))

    def open(self, cell: Cell) -> list[Bytes]:
        """The cell's slots on the device; what is computed from here on waits for them."""
        slab = self._prefetcher.take(cell) if cell in self._host else self._device[cell]
        return self._slots(slab)

    def close(self, cell: Cell, window: Window, slots: list[Bytes]) -> None:
        """The pass is done with the cell, and has written the window's slot of what ``open`` gave."""
        if cell in self._host:
            target = self._slots(self._host[cell])[window.slot][0]
            moment = self._engine.copy_out(target, slots[window.slot][0], self._engine.now())
            self._written[cell] = moment
            self._prefetcher.release(cell, moment)

    def snapshot(self, step: int, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A whole cell's keys and values [capacity, N, H] as attention sees them."""
        self._engine.settle()
        cell = (step, layer)
        slots = self._slots(self._host[cell] if cell in self._host else self._device[cell])
        parts = [self.kind.read(*slot, dtype) for slot in slots]
        return torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])

    def _slots(self, slab: Tensor) -> list[Bytes]:
        if id(slab) not in self._cut:
            size = self._slot_nbytes
            slots = [(slab[i * size : (i + 1) * size], tokens) for i, tokens in enumerate(self.shape.slots)]
            self._cut[id(slab)] = slots
        return self._cut[id(slab)]

    def _jobs(self, cells: list[tuple[Cell, Window]]) -> Iterator[tuple[Cell, Fill]]:
        for cell, window in cells:
            if cell in self._host:
                yield cell, self._fill(cell, window)

    def _fill(self, cell: Cell, window: Window) -> Fill:
        def fill(slab: Tensor, after: Moments) -> Moments:
            there, after = after, (*after, self._written.get(cell, DONE))
            # All that the block sees except its own slot, which it writes itself: a stretch before and one behind it.
            for first, last in ((0, window.slot), (window.slot + 1, window.visible)):
                part = slice(first * self._slot_nbytes, last * self._slot_nbytes)
                if first < last:
                    there = (self._engine.copy_in(slab[part], self._host[cell][part], *after),)
            return there

        return fill


@dataclasses.dataclass(frozen=True)
class RingMemory:
    """One layer's memory for one call of the DiT: the ring of the step, then the sink's keys rotated at reading."""

    rings: Rings
    sink: Sink
    cell: Cell
    window: Window
    sink_rope: Rope

    def attend(self, queries: Heads, keys: Heads, v_LNH: Tensor, rope: Rope) -> Tensor:
        window, sink = self.window, self.sink.block(self.cell[1])
        slots = self.rings.open(self.cell)
        own = Own(queries, keys, v_LNH, rope)
        out = self.rings.kind.attend(own, window.slot, slots[: window.visible], sink, self.sink_rope, self.sink.rotated)
        self.rings.close(self.cell, window, slots)
        return out
