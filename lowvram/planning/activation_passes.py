"""Passes between the products of a DiT layer: bytes that they move in the card's memory, and kernels that are started.

Counted from ``lowvram.loading.fused_block``: each pass reads and writes every value once. Shapes: L own tokens, D
width, F width of the feed-forward. The residual is float32; "8 bit" is what a Linear in 8 bit takes.
"""

from __future__ import annotations

import dataclasses

from lowvram.planning.memory_costs import FLOAT32_BYTES, rows_of
from lowvram.planning.rank_layout import Share
from lowvram.planning.workload import Workload
from lowvram_models.config import DiTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassBytes:
    """Bytes read and written in one step of a block: ``between`` the Linears, and of queries, keys and values on their
    way into ``rings`` and to attention."""

    between: int
    rings: int


def pass_bytes(config: DiTConfig, work: Workload, share: Share, kv: str, *, eight_bit: bool) -> PassBytes:
    """Of one step. ``eight_bit``: whether Linears take 8 bit, else the dtype that is computed in."""
    if not share.denoises:
        return PassBytes(between=0, rings=0)
    value, residual = work.value_bytes, FLOAT32_BYTES
    row, quantize = (1, value + 1) if eight_bit else (value, 0)
    # Residual, gate and what was computed added, and normed for the next Linear.
    norm = 2 * residual + value + row
    # Three of them; inputs of both outputs quantized; norm of the queries to the text; the feed-forward's hidden values
    # quantized. Behind the last layer its sum, before the first none: a residual more.
    layer = 3 * norm + 2 * quantize + 2 * value
    injection = norm + 2 * value + quantize
    injections = len(config.audio_inject_layers)
    width = config.num_layers * layer + injections * injection + residual
    per_token = width * config.dim + config.num_layers * quantize * config.ffn_dim
    own = share.heads * config.head_dim
    if kv == "int8":  # keys and values are read for mean and scales first
        moved = work.block_tokens * (5 * value + 3)
    else:  # normed and rotated, laid into the block, and then the whole ring behind each other for attention
        moved = work.block_tokens * 8 * value + 2 * (work.ring_tokens + work.sink_tokens) * 2 * value
    return PassBytes(
        between=rows_of(config, work, share)["block"] * per_token,
        rings=config.num_layers * own * moved,
    )


# Bytes that the VAE's decoder moves between its convolutions: norms with their SiLU in one pass, sums and copies, of a
# latent frame for each pixel, unit of the base width and byte of a value. Counted over its operations; the test counts
# them again.
DECODE_PASS_BYTES = 309.0


def decode_pass_bytes(base_dim: int, work: Workload) -> int:
    """Of one block."""
    return int(DECODE_PASS_BYTES * work.value_bytes * base_dim * work.pixels * work.frames_per_block)


# Kernels that a layer starts, by kind of ring; what an audio injection adds in a block's first step, which also makes
# keys and values of the voice, and in the others; and what a step starts beside layers.
# Counted by `python benchmarks/host_time.py`, and held by tests/lowvram/test_host_time.py.
LAUNCHES_A_LAYER = {"int8": 19, "plain": 30}
FIRST_INJECTION, NEXT_INJECTION = 15, 7
BESIDE_LAYERS = 19


def launches(config: DiTConfig, kv: str, steps: int, replayed: int = 0) -> int:
    """Kernels that a block of so many steps asks the host for, one by one: without those of ``replayed`` layers."""
    if not steps:
        return 0
    injections = len(config.audio_inject_layers)
    layers = LAUNCHES_A_LAYER[kv] * (steps * config.num_layers - replayed)
    # Graphs hold injections too: on average over the layers.
    heard = injections * (FIRST_INJECTION + NEXT_INJECTION * (steps - 1))
    heard -= injections * NEXT_INJECTION * replayed // max(1, config.num_layers)
    return max(0, layers + heard) + BESIDE_LAYERS * steps
