"""The DiT over a stretch of blocks at one noise level: what ``lowvram.denoise.rollout`` computes block by block.

Step i of a block attends to what step i of the blocks before it left in its ring, and to the sink. With all blocks at
the same noise level that is one pass, in which a block sees those before it, as many as a ring holds.
Shapes: C latent channels, F latent frames, h x w latent size, N heads, H head_dim, L tokens.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from lowvram_models.attention import Heads
from lowvram_models.audio_adapter import AudioTokens
from lowvram_models.dit import CausalDiT, LayerInputs
from lowvram_models.rope import Rope, apply_rope, block_rope, condition_rope, reference_time

BLOCK = 3
DISTANCE = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditions:
    """``reference`` [C, 1, h, w], ``motion`` [C, 19, h, w], ``context`` [tokens, text_dim], and of all blocks ``audio``
    [1, 25, audio_dim, 4 F]."""

    reference: Tensor
    motion: Tensor
    context: Tensor
    audio: Tensor


class _Recorder:
    """A layer's part of the sink."""

    def attend(self, queries: Heads, keys: Heads, v_LNH: Tensor, rope: Rope) -> Tensor:
        self.k_LNH, self.v_LNH = keys(None), v_LNH
        return _attention(queries(rope), apply_rope(self.k_LNH, rope), v_LNH)


@dataclasses.dataclass(frozen=True)
class _Stretch:
    """A layer's memory in one pass: ``starts`` are the blocks' first tokens, ``sink_ropes`` what each turns the sink's
    keys by, ``ring`` the blocks that a block sees, itself among them."""

    sink: _Recorder
    starts: list[int]
    sink_ropes: list[Rope]
    ring: int

    def attend(self, queries: Heads, keys: Heads, v_LNH: Tensor, rope: Rope) -> Tensor:
        q, k = queries(rope), keys(rope)
        ends = [*self.starts[1:], len(q)]
        seen = []
        for index, (start, end) in enumerate(zip(self.starts, ends, strict=True)):
            first = self.starts[max(0, index + 1 - self.ring)]
            k_seen = torch.cat([k[first:end], apply_rope(self.sink.k_LNH, self.sink_ropes[index])])
            v_seen = torch.cat([v_LNH[first:end], self.sink.v_LNH])
            seen.append(_attention(q[start:end], k_seen, v_seen))
        return torch.cat(seen)


def velocity(
    dit: CausalDiT, noisy_CFhw: Tensor, timestep: float, given: Conditions, *, first_frame: int, ring: int = 4
) -> Tensor:
    """What the DiT says of blocks of 3 latent frames (the last may be shorter) from latent frame ``first_frame`` of a
    video on: [C, F, h, w]. Differentiable."""
    frames, rows, columns = noisy_CFhw.shape[1], noisy_CFhw.shape[2] // 2, noisy_CFhw.shape[3] // 2
    head_dim = dit.config.head_dim
    text = dit.embed_text(given.context)
    sink = fill_sink(dit, given, text)
    firsts = range(0, frames, BLOCK)
    audio = _joined([dit.embed_audio(part) for part in given.audio.split(4 * BLOCK, dim=-1)])
    inputs = LayerInputs(
        time=dit.embed_time(timestep),
        text=text,
        rope=block_rope(first_frame, frames, rows, columns, head_dim),
        frames=frames,
        audio=audio,
    )
    times = [reference_time(first_frame + first, DISTANCE) for first in firsts]
    ropes = [condition_rope(rows, columns, head_dim, reference_time=time) for time in times]
    starts = [first * rows * columns for first in firsts]
    x_LD = dit.embed_latent(noisy_CFhw)
    for layer, recorded in enumerate(sink):
        x_LD = dit.layer(layer, x_LD, inputs, _Stretch(recorded, starts, ropes, ring))
    return dit.unpatchify(dit.head(x_LD, inputs.time, torch.float32), (frames, rows, columns))


def fill_sink(dit: CausalDiT, given: Conditions, text: Tensor) -> list[_Recorder]:
    """Each layer's keys and values of the conditions."""
    rows, columns = (size // 2 for size in given.reference.shape[2:])
    rope = condition_rope(rows, columns, dit.config.head_dim)
    inputs = LayerInputs(time=dit.embed_time(0.0), text=text, rope=rope, frames=1)
    x_LD = dit.embed_conditions(given.reference, given.motion)
    sink = [_Recorder() for _ in range(dit.config.num_layers)]
    for layer, recorder in enumerate(sink):
        x_LD = dit.layer(layer, x_LD, inputs, recorder)
    return sink


def _joined(parts: list[AudioTokens]) -> AudioTokens:
    return AudioTokens(torch.cat([p.frame for p in parts], dim=1), torch.cat([p.clip for p in parts], dim=1))


def _attention(q_LNH: Tensor, k_LNH: Tensor, v_LNH: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1)[None] for t in (q_LNH, k_LNH, v_LNH))
    return functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
