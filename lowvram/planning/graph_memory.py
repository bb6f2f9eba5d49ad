"""Bytes that CUDA graphs of resident layers take on the device; see ``lowvram.denoise.cuda_graphs``."""

from __future__ import annotations

from lowvram.offload.placement import Placement
from lowvram.planning import workspace
from lowvram.planning.memory_costs import KIB, MIB
from lowvram.planning.model_sizes import ModelFacts
from lowvram.planning.share import Share
from lowvram.planning.workload import Workload

GRAPH_BYTES = 128 * KIB
"""One graph as the driver keeps it, about 30 launches. Not measured: a judgement."""
STREAM_BYTES = 32 * MIB
"""cuBLAS's workspace for the stream that captures, on Hopper; less before."""


def graph_bytes(facts: ModelFacts, work: Workload, placement: Placement, share: Share) -> int:
    """The graphs themselves, one for each ring that stays on the device with its layer and each of its slots; the pool
    in which a layer works, beside that of layers without a graph; and what a call reads, once for each step.

    0 where nothing is captured.
    """
    config, streamed = facts.config, set(placement.streamed_layers)
    hosted = sum(layer not in streamed for _, layer in placement.host_rings)
    cells = len(share.steps) * (config.num_layers - len(streamed)) - hosted
    if not cells or share.exchanges:
        return 0
    seen = work.ring_tokens + work.sink_tokens
    pool = workspace.layer_workspace(
        config, share.block_tokens, quantized=facts.quantized, seen_tokens=seen, value_bytes=work.value_bytes
    ).peak
    inputs = [workspace.rollout_inputs(config, work, blocks, share) for blocks in (len(share.steps), 0)]
    # A clip that is no multiple of a block has shorter blocks, with inputs of their own.
    lanes = (inputs[0] - inputs[1]) * (2 if work.frames_per_clip % work.frames_per_block else 1)
    return cells * work.blocks_per_clip * GRAPH_BYTES + STREAM_BYTES + pool + lanes
