"""What self-attention remembers: a KV ring for each denoising step, and the sink that all steps share.

Both implement ``lowvram_models.attention.AttentionMemory``. Shapes: L tokens, N heads, H head_dim.
Source: model-spec section 3 (rings, sink) and 5 (RoPE of the condition keys at reading).
"""

from __future__ import annotations

import dataclasses

import torch

from lowvram_kernels.attention import attention
from lowvram_models.rope import Rope, apply_rope

Tensor = torch.Tensor


class Sink:
    """Keys (normalised, before RoPE) and values of the condition tokens, [L, N, H] for each layer."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def recorder(self) -> SinkRecorder:
        return SinkRecorder(self)

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))


class SinkRecorder:
    """Memory of the sink pass: keeps each layer's keys and values, attends among the condition tokens."""

    def __init__(self, sink: Sink):
        self._sink = sink

    def attend(self, q_LNH: Tensor, k_LNH: Tensor, v_LNH: Tensor, rope: Rope) -> Tensor:
        self._sink.keys.append(k_LNH)
        self._sink.values.append(v_LNH)
        return attention(apply_rope(q_LNH, rope), apply_rope(k_LNH, rope), v_LNH)


@dataclasses.dataclass(frozen=True)
class Window:
    """Where a block stands in a ring, in tokens: written at [start, start + length), read from [0, visible)."""

    start: int
    length: int
    visible: int


def ring_window(first_frame: int, frames: int, tokens_per_frame: int, capacity: int) -> Window:
    """Window of a block that starts at latent frame ``first_frame`` of the video.

    Raises:
        ValueError: the block would run over the ring's end, which no clip of whole blocks does.
    """
    begin, length = first_frame * tokens_per_frame, frames * tokens_per_frame
    start = begin % capacity
    if start + length > capacity:
        raise ValueError(f"a block of {length} tokens at {start} runs over the end of a ring of {capacity} tokens")
    return Window(start, length, start + length if begin < capacity else capacity)


class KVRing:
    """Keys (after RoPE) and values of one denoising step: [layers, capacity, N, H] each, written once a block."""

    def __init__(self, layers: int, capacity: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        shape = (layers, capacity, heads, head_dim)
        pinned = device.type == "cpu" and torch.cuda.is_available()
        self.keys = torch.zeros(shape, dtype=dtype, device=device, pin_memory=pinned)
        self.values = torch.zeros(shape, dtype=dtype, device=device, pin_memory=pinned)

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def extend(self, layer: int, window: Window, k_LNH: Tensor, v_LNH: Tensor) -> tuple[Tensor, Tensor]:
        """Write a block's keys and values; return all that the block may see, on the device of ``k_LNH``."""
        seen = []
        for ring, new in ((self.keys, k_LNH), (self.values, v_LNH)):
            ring[layer, window.start : window.start + window.length].copy_(new)
            seen.append(ring[layer, : window.visible].to(new.device))
        return seen[0], seen[1]


class RingMemory:
    """One layer's memory for one call of the DiT: the ring of the step, then the sink's keys rotated at reading."""

    def __init__(self, ring: KVRing, sink: Sink, layer: int, window: Window, sink_rope: Rope):
        self._ring, self._sink, self._layer, self._window, self._sink_rope = ring, sink, layer, window, sink_rope

    def attend(self, q_LNH: Tensor, k_LNH: Tensor, v_LNH: Tensor, rope: Rope) -> Tensor:
        keys, values = self._ring.extend(self._layer, self._window, apply_rope(k_LNH, rope), v_LNH)
        sink_keys = apply_rope(self._sink.keys[self._layer], self._sink_rope)
        keys = torch.cat([keys, sink_keys])
        values = torch.cat([values, self._sink.values[self._layer]])
        return attention(apply_rope(q_LNH, rope), keys, values)
