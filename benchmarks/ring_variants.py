"""Ways to keep KV rings in 4 bits, simulated: keys and values are rounded as they would be, and attention is exact.

Shapes: T tokens of a block, N heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from lowvram.denoise.kv_format import Bytes, Own, PlainFormat
from lowvram_kernels.attention import attention
from lowvram_kernels.ring_codec import STEP, KVBlock
from lowvram_kernels.rotation import largest_group, rotated
from lowvram_kernels.rows import FLOOR
from lowvram_models.rope import Rope, apply_rope

Tensor = torch.Tensor
SCALE_BITS = 16


@dataclasses.dataclass(frozen=True)
class Coding:
    """Codes of ``bits``, with a bfloat16 scale for each ``group`` of neighbours: channels of a token's head, or tokens
    of a channel where ``along`` is "tokens". ``offset``: codes count from a bfloat16 least value, instead of from zero.
    ``hadamard`` turns a head's channels before, and back behind it. ``mean``: what the tokens of a block share is kept
    apart, once. ``before_rope``: keys are kept as they are before RoPE."""

    bits: int = 4
    group: int = 32
    along: str = "channels"
    offset: bool = False
    hadamard: bool = False
    mean: bool = False
    before_rope: bool = False

    def bits_a_value(self, tokens: int, head_dim: int) -> float:
        """Of a block of so many tokens: codes, scales, least values and the mean."""
        length = tokens if self.along == "tokens" else head_dim
        group = min(self.group, length)
        of_groups = SCALE_BITS * (1 + self.offset) * -(-length // group) / length
        return self.bits + of_groups + (SCALE_BITS / tokens if self.mean else 0.0)

    def __call__(self, x_TNH: Tensor) -> Tensor:
        """What is read again of what was written."""
        x = x_TNH.float()
        if self.hadamard:
            x = rotated(x, largest_group(x.shape[-1]))
        mean = x.mean(dim=0, keepdim=True).bfloat16().float() if self.mean else torch.zeros(())
        x = self._there_and_back((x - mean).movedim(0, -1) if self.along == "tokens" else x - mean)
        x = (x.movedim(-1, 0) if self.along == "tokens" else x) + mean
        return (rotated(x, largest_group(x.shape[-1])) if self.hadamard else x).to(x_TNH.dtype)

    def _there_and_back(self, x: Tensor) -> Tensor:
        """[..., n]; the last group may be shorter than the others."""
        return torch.cat([self._one_group(part) for part in x.split(min(self.group, x.shape[-1]), dim=-1)], dim=-1)

    def _one_group(self, x: Tensor) -> Tensor:
        if self.offset:
            levels = 2**self.bits - 1
            least = x.amin(dim=-1, keepdim=True).bfloat16().float()
            span = x.amax(dim=-1, keepdim=True) - least
            scale = (span.clamp_min(FLOOR) * (1 + 2.0**-8) / levels).bfloat16().float()
            return ((x - least) / scale).round().clamp(0, levels) * scale + least
        most = 2 ** (self.bits - 1) - 1
        scale = (x.abs().amax(dim=-1, keepdim=True).clamp_min(FLOOR) * (STEP * 127) / most).bfloat16().float()
        return (x / scale).round().clamp(-most, most) * scale


# As the int8 rings' own: keys around the mean of their block with a scale a token and head, values with one a channel.
INT8 = Coding(bits=8, group=2**20, along="tokens")
INT8_KEYS = Coding(bits=8, group=128, mean=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """How a ring's keys and values are kept, and those of the sink."""

    title: str
    keys: Coding
    values: Coding
    sink_keys: Coding = INT8_KEYS
    sink_values: Coding = INT8


def _variants() -> dict[str, Variant]:
    even, offset = Coding(), Coding(offset=True)
    around, channel = dataclasses.replace(offset, mean=True), Coding(along="tokens", offset=True)
    even_around, of = Coding(mean=True), dataclasses.replace
    group, tokens = (
        "groups of 32 channels of a token",
        "K groups of 32 tokens of a channel, V of 32 channels of a token",
    )
    return {
        "exact": Variant(title="rings in 16 bits, the sink alone in 8", keys=Coding(bits=16), values=Coding(bits=16)),
        "whole-head": Variant(
            title="a whole head of a token, symmetric", keys=of(even_around, group=128), values=of(even, group=128)
        ),
        "even": Variant(title=f"{group}, symmetric", keys=even_around, values=even),
        "offset": Variant(title=f"{group}, offset", keys=around, values=offset),
        "offset-16": Variant(
            title="groups of 16 channels of a token, offset", keys=of(around, group=16), values=of(offset, group=16)
        ),
        "even-before": Variant(
            title=f"{group}, symmetric, K before RoPE", keys=of(even_around, before_rope=True), values=even
        ),
        "channel": Variant(title=f"{tokens}, offset", keys=channel, values=offset),
        "channel-even": Variant(title=f"{tokens}, symmetric", keys=Coding(along="tokens", mean=True), values=even),
        "channel-before": Variant(
            title=f"{tokens}, offset, K before RoPE", keys=of(channel, before_rope=True), values=offset
        ),
        "turned-head": Variant(
            title="a whole head of a token, symmetric, rotated",
            keys=of(even_around, group=128, hadamard=True),
            values=of(even, group=128, hadamard=True),
        ),
        "turned-even": Variant(
            title=f"{group}, symmetric, rotated",
            keys=of(even_around, hadamard=True),
            values=of(even, hadamard=True),
        ),
        "turned": Variant(
            title=f"{group}, offset, rotated", keys=of(around, hadamard=True), values=of(offset, hadamard=True)
        ),
        "keys-only": Variant(title=f"{group}, offset, of K; V in 8 bits", keys=around, values=INT8),
        "values-only": Variant(title=f"{group}, offset, of V; K in 8 bits", keys=INT8_KEYS, values=offset),
        "sink-too": Variant(
            title=f"{group}, offset, of the sink too", keys=around, values=offset, sink_keys=around, sink_values=offset
        ),
    }


VARIANTS = _variants()


class Rounded(PlainFormat):
    """Rings and sink in the dtype that is computed in, of values that ``variant`` can write."""

    def __init__(self, heads: int, head_dim: int, dtype: torch.dtype, variant: Variant):
        super().__init__(heads, head_dim, dtype)
        self._variant = variant

    def write(self, block: Tensor, k_LNH: Tensor, v_LNH: Tensor) -> None:
        """The sink's."""
        super().write(block, self._variant.sink_keys(k_LNH), self._variant.sink_values(v_LNH))

    def attend(
        self,
        own: Own,
        slot: int,
        blocks: Sequence[Bytes],
        sink: Bytes,
        sink_rope: Rope,
        rotated: KVBlock | None = None,
    ) -> Tensor:
        q_LNH = own.queries(own.rope)
        keys = self._variant.keys
        k = apply_rope(keys(own.keys(None)), own.rope) if keys.before_rope else keys(own.keys(own.rope))
        super().write(blocks[slot][0], k, self._variant.values(own.v_LNH))
        parts = [self._parts(*block) for block in blocks]
        sink_k, sink_v = self._parts(*sink)
        k = torch.cat([*(k for k, _ in parts), apply_rope(sink_k, sink_rope)])
        return attention(q_LNH, k, torch.cat([*(v for _, v in parts), sink_v]))
