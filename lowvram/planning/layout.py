"""Bytes of one placement on device and host, stage by stage."""

from __future__ import annotations

import dataclasses

from lowvram.placement import Placement
from lowvram.planning import workspace
from lowvram.planning.costs import COMPUTE_BYTES, FLOAT32_BYTES, GIB, MIB, allocated, kv_bytes, ring_costs
from lowvram.planning.facts import ModelFacts
from lowvram.planning.workload import Workload

RESERVE_BYTES = 256 * MIB
"""Kept free beside what is counted: workspaces of cuBLAS (32 MiB a stream on Hopper, 8 MiB before) and cuDNN, which
takes a convolution that needs less where there is no room for more, the small tensors that nobody counts, and what
the allocator cannot join again. Not measured: a judgement, so it stands apart in every plan."""

HOST_BASE_BYTES = 3 * GIB
"""Host memory of a process without anything pinned: interpreter, PyTorch with CUDA's libraries, decoded frames."""

_PAGE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceParts:
    """Bytes that lie on the device from the first block to the last."""

    shared_weights: int
    resident_layers: int
    weight_slots: int
    rings: int
    ring_slots: int
    sink: int
    rollout_inputs: int
    vae: int
    decoder_cache: int

    @property
    def total(self) -> int:
        return sum(dataclasses.asdict(self).values())


def device_parts(facts: ModelFacts, work: Workload, placement: Placement) -> DeviceParts:
    config, streamed = facts.config, placement.streamed_layers
    ring, sink = ring_costs(config, work, placement.kv), kv_bytes(config, work.sink_tokens, placement.kv)
    slabs = [bound_bytes(facts, nbytes) for i, nbytes in enumerate(facts.layer_bytes) if i not in set(streamed)]
    slot = max((facts.layer_bytes[i] for i in streamed), default=0)
    return DeviceParts(
        shared_weights=allocated(bound_bytes(facts, facts.shared_bytes)),
        resident_layers=sum(map(allocated, slabs)),
        weight_slots=placement.weight_slots * allocated(slot) + widened(facts, streamed),
        rings=(ring.cells - len(placement.host_rings)) * allocated(ring.cell),
        ring_slots=placement.ring_slots * allocated(ring.cell) if placement.host_rings else 0,
        sink=allocated(config.num_layers * sink.block),
        rollout_inputs=workspace.rollout_inputs(config, work, placement.wave),
        vae=allocated(facts.vae_bytes),
        decoder_cache=workspace.decoder_cache(facts.vae_base_dim, work),
    )


def bound_bytes(facts: ModelFacts, slab_nbytes: int) -> int:
    """What a slab takes once it is bound: weights stored in float32 are narrowed to what is computed in."""
    return slab_nbytes * COMPUTE_BYTES // FLOAT32_BYTES if facts.precision == "fp32" else slab_nbytes


def widened(facts: ModelFacts, streamed: tuple[int, ...]) -> int:
    """Copies in the compute dtype that streamed float32 layers leave beside their staging slots."""
    if facts.precision != "fp32":
        return 0
    return sum(bound_bytes(facts, facts.layer_bytes[index]) for index in streamed)


def stage_peaks(facts: ModelFacts, work: Workload, parts: DeviceParts, text_device: str) -> dict[str, int]:
    """Device bytes at the worst moment of each stage, without the reserve."""
    config, base_dim = facts.config, facts.vae_base_dim
    text = allocated(facts.text_bytes) + workspace.text_workspace(facts) if text_device == "cuda" else 0
    seen = work.ring_tokens + work.sink_tokens
    block = workspace.layer_workspace(config, work.block_tokens, quantized=facts.quantized, seen_tokens=seen)
    sink = workspace.layer_workspace(config, work.sink_tokens, quantized=facts.quantized, audio=False)
    sink_residual = work.sink_tokens * config.dim * FLOAT32_BYTES
    return {
        "encode_text": text,
        "encode_audio": facts.audio.parameters * FLOAT32_BYTES + workspace.audio_workspace(facts.audio),
        "encode_image": parts.vae + workspace.encode_workspace(base_dim, work),
        "load_dit": parts.total - parts.decoder_cache + allocated(bound_bytes(facts, facts.start_bytes)),
        "prefill_sink": parts.total + sink_residual + sink.peak,
        "denoise": parts.total + block.peak,
        "decode": parts.total + workspace.decode_workspace(base_dim, work),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostParts:
    """Host bytes. The artifact's file is mapped and read through the page cache, which the system takes back when it
    wants to: it is not counted, except for a text encoder that computes from there."""

    base: int
    pinned_weights: int
    pinned_rings: int
    pinned_cache: int
    text_encoder: int

    @property
    def peak(self) -> int:
        """The text encoder is gone before anything is pinned."""
        return self.base + max(self.pinned_weights + self.pinned_rings + self.pinned_cache, self.text_encoder)


def host_parts(facts: ModelFacts, work: Workload, placement: Placement, text_device: str) -> HostParts:
    cell = ring_costs(facts.config, work, placement.kv).cell
    return HostParts(
        base=HOST_BASE_BYTES,
        pinned_weights=sum(_pages(facts.layer_bytes[index]) for index in placement.streamed_layers),
        pinned_rings=len(placement.host_rings) * _pages(cell),
        pinned_cache=workspace.decoder_cache(facts.vae_base_dim, work),
        text_encoder=facts.text_bytes if text_device == "cpu" else 0,
    )


def _pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceParts:
    """Device bytes of the published way: everything in bf16 on the card at once."""

    dit: int
    kv_rings: int
    sink: int
    text_encoder: int
    audio_encoder: int
    vae: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(dataclasses.asdict(self).values())


def reference_parts(facts: ModelFacts, work: Workload) -> ReferenceParts:
    config, base_dim = facts.config, facts.vae_base_dim
    ring, sink = ring_costs(config, work, "plain"), kv_bytes(config, work.sink_tokens, "plain")
    seen = work.ring_tokens + work.sink_tokens
    layer = workspace.layer_workspace(config, work.block_tokens, quantized=False, seen_tokens=seen)
    return ReferenceParts(
        dit=facts.parameters * COMPUTE_BYTES,
        kv_rings=ring.cells * ring.payload,
        sink=sink.payload * config.num_layers,
        text_encoder=facts.text_parameters * COMPUTE_BYTES,
        audio_encoder=facts.audio.parameters * FLOAT32_BYTES,
        vae=facts.vae_parameters * COMPUTE_BYTES,
        workspace=workspace.decoder_cache(base_dim, work) + max(layer.peak, workspace.decode_workspace(base_dim, work)),
    )
