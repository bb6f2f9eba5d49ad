"""Bytes and operations of the rollout from shapes alone: rings, sink, arithmetic.

Shapes: L tokens of a block, D width, N heads, H head_dim. ``kv`` is "plain" (keys and values in the dtype that is
computed in) or "int8", as in ``Placement``. ``share`` is what one rank has of it all; ``value_bytes`` are those of a
value in the dtype that is computed in.
"""

from __future__ import annotations

import dataclasses

from lowvram.planning.rank_layout import Share
from lowvram.planning.workload import Workload
from lowvram_kernels.ring_codec import SlotLayout
from lowvram_kernels.rounding import round_up
from lowvram_models.config import DiTConfig

KIB, MIB, GIB = 2**10, 2**20, 2**30
BFLOAT16_BYTES, FLOAT32_BYTES = 2, 4
_BLOCK_ALIGNMENT = 16
# Audio tokens that a latent frame is given (model-spec section 4).
_AUDIO_TOKENS = 5

# The VAE's decoder computes so many operations a latent frame, for each pixel of a frame and each square of the base
# width. Counted over the convolutions of diffusers' AutoencoderKLWan; the test counts them again.
DECODE_OPERATIONS = 3665.3


def allocated(nbytes: int) -> int:
    """What torch's caching allocator takes from the card for a tensor: 2 MiB steps from 10 MiB on, where every tensor
    has a segment of its own; smaller ones share segments in steps of 512 bytes."""
    step = 2 * MIB if nbytes >= 10 * MIB else 512
    return round_up(nbytes, step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVBytes:
    """Keys and values of some tokens of one layer: what is stored of them, and beside it scales, a mean, sums and what
    fills up tiles."""

    payload: int
    scales: int

    @property
    def block(self) -> int:
        """As a block of tokens lies in memory."""
        return round_up(self.payload + self.scales, _BLOCK_ALIGNMENT)


def kv_bytes(config: DiTConfig, tokens: int, kv: str, heads: int, value_bytes: int) -> KVBytes:
    """Bytes of keys and values of so many tokens and heads, one layer and one step."""
    width = heads * config.head_dim
    if kv == "plain":
        return KVBytes(payload=2 * tokens * width * value_bytes, scales=0)
    if not heads:  # a rank that only decodes
        return KVBytes(payload=0, scales=0)
    payload = 2 * tokens * width
    layout = SlotLayout(tokens=tokens, heads=heads, head_dim=config.head_dim)
    return KVBytes(payload=payload, scales=layout.nbytes - payload)


def key_bytes(config: DiTConfig, tokens: int, heads: int) -> int:
    """Of keys in 8 bits alone, as the sink's rotated ones stand."""
    return heads and SlotLayout(tokens=tokens, heads=heads, head_dim=config.head_dim).key_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingCosts:
    """``cells`` is the number of rings, one a step and layer; ``cell`` and the others are bytes of one of them.

    ``read`` crosses PCIe to the device and ``written`` back, once a block, where the ring lies on the host: a block
    reads all slots but the one that it writes itself.
    """

    cells: int
    payload: int
    scales: int
    cell: int
    read: int
    written: int


def ring_costs(config: DiTConfig, work: Workload, kv: str, share: Share) -> RingCosts:
    """Rings of the rank's steps: its heads of all tokens."""
    slots = work.blocks_per_clip
    block = kv_bytes(config, work.block_tokens, kv, share.heads, work.value_bytes)
    return RingCosts(
        cells=len(share.steps) * config.num_layers,
        payload=block.payload * slots,
        scales=block.scales * slots,
        cell=block.block * slots,
        read=block.block * (slots - 1),
        written=block.block,
    )


def sink_bytes(config: DiTConfig, work: Workload, kv: str, share: Share) -> KVBytes:
    """The sink of all layers, the rank's heads of it; every step shares it."""
    layer = kv_bytes(config, work.sink_tokens, kv, share.heads, work.value_bytes)
    return KVBytes(payload=layer.payload * config.num_layers, scales=layer.scales * config.num_layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operations:
    """Multiplications and additions, each counted as one, of one step of one block."""

    linear: int
    attention: int


def step_operations(config: DiTConfig, work: Workload, share: Share) -> Operations:
    """Linears and attention of one step of a block, with full rings; text keys are computed anew in every step.

    Linears are over the rank's own tokens, and so are the attentions to text and voice, which have all heads;
    self-attention is over all tokens with the rank's heads. Keys of text and voice are computed by every rank.
    """
    if not share.denoises:
        return Operations(linear=0, attention=0)
    rows, dim = rows_of(config, work, share), config.dim
    tokens, text, injections = rows["block"], rows["text"], len(config.audio_inject_layers)
    per_matrix = 2 * dim * dim
    # q, k, v, o of self-attention, q and o of cross-attention over the block; k and v over the text.
    block = per_matrix * (6 * tokens + 2 * text) + 2 * 2 * tokens * dim * config.ffn_dim
    injection = per_matrix * (2 * tokens + 2 * rows["audio"] + 2 * rows["frames"])
    width, keys = share.heads * config.head_dim, work.ring_tokens + work.sink_tokens
    beside = 4 * dim * tokens * (config.num_layers * text + injections * _AUDIO_TOKENS)
    return Operations(
        linear=config.num_layers * block + injections * injection,
        attention=4 * width * work.block_tokens * config.num_layers * keys + beside,
    )


def rows_of(config: DiTConfig, work: Workload, share: Share) -> dict[str, int]:
    """How many rows the DiT's Linears run over in one step of a block, by the kinds of ``LinearSizes``."""
    if not share.denoises:
        return dict.fromkeys(("block", "text", "audio", "frames"), 0)
    frames = work.frames_per_block
    return {"block": share.block_tokens, "text": config.text_len, "audio": _AUDIO_TOKENS * frames, "frames": frames}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchanged:
    """Bytes to and from the other ranks of a stage."""

    sent: int
    received: int


def step_exchange(config: DiTConfig, work: Workload, share: Share) -> Exchanged:
    """Of one step of a block. In every layer, queries, keys and values go from own tokens of all heads to all tokens of
    own heads, and the attended values go back; at the end, every rank gets all of the head's outputs."""
    if not share.exchanges:
        return Exchanged(sent=0, received=0)
    own, others = share.block_tokens, work.block_tokens - share.block_tokens
    mine = share.heads * config.head_dim
    away, back = own * (config.dim - mine), others * mine  # values of own tokens elsewhere, of others' tokens here
    outputs = 4 * config.out_dim * FLOAT32_BYTES  # a token's, four values a channel
    return Exchanged(
        sent=config.num_layers * (3 * away + back) * work.value_bytes + own * (share.parts - 1) * outputs,
        received=config.num_layers * (3 * back + away) * work.value_bytes + others * outputs,
    )


def decode_operations(base_dim: int, work: Workload) -> int:
    """The VAE's decoder over one block."""
    return int(DECODE_OPERATIONS * base_dim**2 * work.pixels * work.frames_per_block)
