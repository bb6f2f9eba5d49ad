"""What self-attention remembers: a KV ring for each denoising step, and the sink that all steps share.

Both implement ``lowvram_models.attention.AttentionMemory``. Shapes: L tokens, N heads, H head_dim.
Source: model-spec section 3 (rings, sink) and 5 (RoPE of the condition keys at reading).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator

import torch

from lowvram.conveyor import Conveyor, Fill
from lowvram.engine import DONE, Engine, Moment
from lowvram.kv_codec import KVCodec
from lowvram_kernels.attention import attention
from lowvram_models.rope import Rope, apply_rope

Tensor = torch.Tensor

_ALIGNMENT = 16
Cell = tuple[int, int]
"""(step, layer): one ring of one layer."""


class Sink:
    """Keys (normalised, before RoPE) and values of the condition tokens, a block for each layer, on the device."""

    def __init__(self, codec: KVCodec, layers: int, tokens: int, heads: int, head_dim: int, device: torch.device):
        self._codec, self.shape = codec, (tokens, heads, head_dim)
        self._blocks = torch.empty(layers, _aligned(codec.nbytes(tokens)), dtype=torch.uint8, device=device)

    @property
    def tokens(self) -> int:
        return self.shape[0]

    def recorder(self, layer: int) -> SinkRecorder:
        return SinkRecorder(self, layer)

    def write(self, layer: int, k_LNH: Tensor, v_LNH: Tensor) -> None:
        self._codec.encode(self._blocks[layer], k_LNH, v_LNH)

    def read(self, layer: int, k_LNH: Tensor, v_LNH: Tensor) -> None:
        """Fill ``k`` and ``v``."""
        self._codec.decode(self._blocks[layer], k_LNH, v_LNH)

    def nbytes(self) -> int:
        return self._blocks.nbytes


@dataclasses.dataclass(frozen=True)
class SinkRecorder:
    """Memory of the sink pass: keeps a layer's keys and values, attends among the condition tokens."""

    sink: Sink
    layer: int

    def attend(self, q_LNH: Tensor, k_LNH: Tensor, v_LNH: Tensor, rope: Rope) -> Tensor:
        self.sink.write(self.layer, k_LNH, v_LNH)
        return attention(apply_rope(q_LNH, rope), apply_rope(k_LNH, rope), v_LNH)


@dataclasses.dataclass(frozen=True)
class Window:
    """Where a block stands in a ring: it is written to ``slot`` and sees the slots [0, ``visible``)."""

    slot: int
    visible: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingShape:
    """A ring holds one clip, a slot for each of its blocks; ``slots`` are their tokens (the last may have fewer)."""

    slots: tuple[int, ...]
    heads: int
    head_dim: int

    @classmethod
    def of(cls, frames_per_clip: int, frames_per_block: int, tokens_per_frame: int, **head: int) -> RingShape:
        starts = range(0, frames_per_clip, frames_per_block)
        frames = [min(frames_per_block, frames_per_clip - start) for start in starts]
        return cls(slots=tuple(f * tokens_per_frame for f in frames), **head)

    @property
    def capacity(self) -> int:
        return sum(self.slots)

    def window(self, clip: int, slot: int) -> Window:
        """Window of a block: in the first clip it sees what was written, from the second on the whole ring."""
        return Window(slot, slot + 1 if clip == 0 else len(self.slots))


class Rings:
    """The rings of all steps and layers: some on the device, the others on the host with a staged copy while in use.

    A cell lies in one stretch of bytes, slot behind slot. From the host, the slots that a block sees are copied in
    ahead of their use; only the block's own slot is copied out again.
    """

    def __init__(self, shape: RingShape, codec: KVCodec, engine: Engine, steps: int, layers: int):
        self.shape, self._codec, self._engine = shape, codec, engine
        self._slot_nbytes = _aligned(codec.nbytes(max(shape.slots)))
        self._all = [(step, layer) for step in range(steps) for layer in range(layers)]
        self._device: dict[Cell, Tensor] = {}
        self._host: dict[Cell, Tensor] = {}
        self._written: dict[Cell, Moment] = {}
        self._conveyor = Conveyor(engine, [])

    @property
    def cell_nbytes(self) -> int:
        return self._slot_nbytes * len(self.shape.slots)

    def nbytes(self) -> int:
        return self.cell_nbytes * len(self._all)

    def place(self, on_host: Collection[Cell], staging: int) -> None:
        """Keep the cells ``on_host`` there and the others on the device; what they hold moves with them."""
        self._engine.settle()
        self._conveyor = Conveyor(self._engine, [])
        for cell in sorted(set(on_host) - set(self._host)):
            self._host[cell] = self._engine.host_buffer(self.cell_nbytes)
            held = self._device.pop(cell, None)
            if held is not None:
                self._engine.copy_out(self._host[cell], held)
                self._engine.settle()
        for cell in (c for c in self._all if c not in self._host and c not in self._device):
            self._device[cell] = torch.empty(self.cell_nbytes, dtype=torch.uint8, device=self._engine.device)
        if self._host:
            device = self._engine.device
            slots = [torch.empty(self.cell_nbytes, dtype=torch.uint8, device=device) for _ in range(staging)]
            self._conveyor = Conveyor(self._engine, slots)

    def expect(self, cells: Iterable[tuple[Cell, Window]]) -> None:
        """Say which cells the coming pass uses, in order, so that those on the host are on their way in time."""
        if self._host:
            self._conveyor.load(self._jobs(list(cells)))

    def update(self, cell: Cell, window: Window, k_LNH: Tensor, v_LNH: Tensor, keys: Tensor, values: Tensor) -> int:
        """Write a block's keys and values; read all that the block sees into ``keys`` and ``values``.

        Returns how many tokens that is.
        """
        staged = cell in self._host
        slab = self._conveyor.take(cell) if staged else self._device[cell]
        self._codec.encode(self._slot(slab, window.slot), k_LNH, v_LNH)
        seen = self._read(slab, window.visible, keys, values)
        if staged:
            self._written[cell] = self._engine.copy_out(
                self._slot(self._host[cell], window.slot), self._slot(slab, window.slot), self._engine.now()
            )
            self._conveyor.release(cell, self._written[cell])
        return seen

    def snapshot(self, step: int, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A whole cell's keys and values [capacity, N, H] as attention sees them."""
        self._engine.settle()
        cell = (step, layer)
        slab = self._host[cell] if cell in self._host else self._device[cell]
        shape = (self.shape.capacity, self.shape.heads, self.shape.head_dim)
        keys, values = (torch.empty(shape, dtype=dtype, device=slab.device) for _ in range(2))
        self._read(slab, len(self.shape.slots), keys, values)
        return keys, values

    def _read(self, slab: Tensor, visible: int, keys: Tensor, values: Tensor) -> int:
        begin = 0
        for slot, tokens in enumerate(self.shape.slots[:visible]):
            part = slice(begin, begin + tokens)
            self._codec.decode(self._slot(slab, slot), keys[part], values[part])
            begin += tokens
        return begin

    def _slot(self, slab: Tensor, slot: int) -> Tensor:
        return slab[slot * self._slot_nbytes : (slot + 1) * self._slot_nbytes]

    def _jobs(self, cells: list[tuple[Cell, Window]]) -> Iterator[tuple[Cell, Fill]]:
        for cell, window in cells:
            if cell in self._host:
                yield cell, self._fill(cell, window)

    def _fill(self, cell: Cell, window: Window) -> Fill:
        def fill(slab: Tensor, after: tuple[Moment, ...]) -> Moment:
            moment: Moment = DONE
            after = (*after, self._written.get(cell, DONE))
            # All that the block sees except its own slot, which it writes itself: a stretch before and one behind it.
            for first, last in ((0, window.slot), (window.slot + 1, window.visible)):
                part = slice(first * self._slot_nbytes, last * self._slot_nbytes)
                if first < last:
                    moment = self._engine.copy_in(slab[part], self._host[cell][part], *after)
            return moment

        return fill


class RingMemory:
    """One layer's memory for one call of the DiT: the ring of the step, then the sink's keys rotated at reading.

    ``keys`` and ``values`` [capacity + sink tokens, N, H] are room to lay them out in.
    """

    def __init__(self, rings: Rings, sink: Sink, cell: Cell, window: Window, sink_rope: Rope, room: Room):
        self._rings, self._sink, self._cell, self._window = rings, sink, cell, window
        self._sink_rope, self._room = sink_rope, room

    def attend(self, q_LNH: Tensor, k_LNH: Tensor, v_LNH: Tensor, rope: Rope) -> Tensor:
        keys, values = self._room.keys, self._room.values
        seen = self._rings.update(self._cell, self._window, apply_rope(k_LNH, rope), v_LNH, keys, values)
        end = seen + self._sink.tokens
        self._sink.read(self._cell[1], keys[seen:end], values[seen:end])
        keys[seen:end] = apply_rope(keys[seen:end], self._sink_rope)
        return attention(apply_rope(q_LNH, rope), keys[:end], values[:end])


@dataclasses.dataclass(frozen=True)
class Room:
    """Where a layer's keys and values [tokens, N, H] are laid out for attention; the same for every layer."""

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Room:
        keys, values = (torch.empty(tokens, heads, head_dim, dtype=dtype, device=device) for _ in range(2))
        return cls(keys, values)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
