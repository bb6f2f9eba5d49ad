"""Bytes of one placement on device and host, stage by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from lowvram.offload.placement import Placement
from lowvram.planning import workspace
from lowvram.planning.memory_costs import BFLOAT16_BYTES, FLOAT32_BYTES, GIB, allocated, kv_bytes, ring_costs
from lowvram.planning.model_sizes import ModelSizes, SlabSizes
from lowvram.planning.rank_layout import Share, whole
from lowvram.planning.workload import Workload
from lowvram.planning.workspace import graph_bytes
from lowvram_kernels.rounding import round_up

HOST_BASE_BYTES = 3 * GIB
"""Host memory of a process without anything pinned: interpreter, PyTorch with CUDA's libraries, decoded frames."""

_PAGE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceParts:
    """Bytes that lie on the device from the first block to the last; of the DiT, or of the VAE, only where the rank has
    them."""

    shared_weights: int = 0
    resident_layers: int = 0
    weight_slots: int = 0
    rings: int = 0
    ring_slots: int = 0
    sink: int = 0
    rollout_inputs: int = 0
    graphs: int = 0
    vae: int = 0
    decoder_cache: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def device_parts(
    sizes: ModelSizes, work: Workload, placement: Placement, share: Share, *, cuda_graphs: bool = False
) -> DeviceParts:
    config, streamed = sizes.config, placement.streamed_layers
    vae = _vae(sizes, work, placement) if share.media else 0
    cache = workspace.decoder_cache(sizes.vae_base_dim, work) if share.media else 0
    if not share.denoises:
        return DeviceParts(vae=vae, decoder_cache=cache)
    ring = ring_costs(config, work, placement.kv, share)
    sink = kv_bytes(config, work.sink_tokens, placement.kv, share.heads, work.value_bytes)
    slot = max((sizes.layer_bytes[i] for i in streamed), default=0)
    return DeviceParts(
        shared_weights=allocated(sizes.shared.bound(work.dtype)),
        resident_layers=sum(allocated(slab.bound(work.dtype)) for slab in resident(sizes, placement)),
        weight_slots=placement.weight_slots * allocated(slot),
        rings=(ring.cells - len(placement.host_rings)) * allocated(ring.cell),
        ring_slots=placement.ring_slots * allocated(ring.cell) if placement.host_rings else 0,
        sink=allocated(config.num_layers * sink.block),
        rollout_inputs=workspace.rollout_inputs(config, work, placement.wave, share)
        + workspace.rotated_keys(config, work, placement.kv, share),
        graphs=graph_bytes(sizes, work, placement, share) if cuda_graphs else 0,
        vae=vae,
        decoder_cache=cache,
    )


def _vae(sizes: ModelSizes, work: Workload, placement: Placement) -> int:
    """Of the VAE as it decodes: as it is stored, or the decoder alone, widened, each tensor for itself."""
    if placement.wide_vae:
        return sum(allocated(values * work.value_bytes) for values in sizes.vae_decoder)
    return _stored_vae(sizes, work)


def _stored_vae(sizes: ModelSizes, work: Workload) -> int:
    return allocated(sum(slab.bound(work.dtype) for slab in sizes.vae))


def resident(sizes: ModelSizes, placement: Placement) -> list[SlabSizes]:
    """The layers that stay on the device."""
    streamed = set(placement.streamed_layers)
    return [slab for index, slab in enumerate(sizes.layers) if index not in streamed]


def loading(slabs: Iterable[SlabSizes], dtype: torch.dtype) -> int:
    """The most that slabs take while they are loaded one after the other: the one that is bound just now stands beside
    all copies that are made of it."""
    there = peak = 0
    for slab in slabs:
        peak = max(peak, there + slab.nbytes + slab.copies(dtype))
        there += slab.bound(dtype)
    return peak


def stage_peaks(
    sizes: ModelSizes,
    work: Workload,
    placement: Placement,
    parts: DeviceParts,
    text_device: str,
    share: Share,
    *,
    resident: bool = False,
) -> dict[str, int]:
    """Device bytes at the worst moment of each stage that the rank has, without the reserve.

    Where weights stay for a next video (``resident``), its voice and its portrait are encoded beside them; what its
    prompt takes then is in ``later_text``.
    """
    encoding = _encoding_peaks(sizes, work, text_device) if share.media else {}
    for stage in ("encode_audio", "encode_image") if resident and encoding else ():
        encoding[stage] += staying(parts)
    denoising = _denoising_peaks(sizes, work, placement, parts, share) if share.denoises else {}
    decode = parts.total + workspace.decode_workspace(sizes.vae_base_dim, work)
    return encoding | denoising | ({"decode": decode} if share.media else {})


def staying(parts: DeviceParts) -> int:
    """Of the device, what stays for the next video where weights stay: they and their slots."""
    return parts.shared_weights + parts.resident_layers + parts.weight_slots


def later_text(sizes: ModelSizes, work: Workload, parts: DeviceParts) -> int:
    """Device bytes of the text encoder beside the weights of an earlier video."""
    return staying(parts) + _encoding_peaks(sizes, work, "cuda")["encode_text"]


def _encoding_peaks(sizes: ModelSizes, work: Workload, text_device: str) -> dict[str, int]:
    text = allocated(sum(slab.bound(work.dtype) for slab in sizes.text))
    text = max(loading(sizes.text, work.dtype), text + workspace.text_workspace(sizes, work.value_bytes))
    image = _stored_vae(sizes, work) + workspace.encode_workspace(sizes.vae_base_dim, work)
    return {
        "encode_text": text if text_device == "cuda" else 0,
        "encode_audio": sizes.audio.parameters * FLOAT32_BYTES + workspace.audio_workspace(sizes.audio),
        "encode_image": max(loading(sizes.vae, work.dtype), image),
    }


def _denoising_peaks(
    sizes: ModelSizes, work: Workload, placement: Placement, parts: DeviceParts, share: Share
) -> dict[str, int]:
    config, quantized, seen = sizes.config, sizes.quantized, work.ring_tokens + work.sink_tokens
    block_of, sink_of = (
        workspace.Attended(tokens=tokens, heads=share.heads) if share.exchanges else None
        for tokens in (work.block_tokens, work.sink_tokens)
    )
    block = workspace.layer_workspace(
        config,
        share.block_tokens,
        quantized=quantized,
        seen_tokens=seen,
        attended=block_of,
        value_bytes=work.value_bytes,
    )
    sink = workspace.layer_workspace(
        config,
        share.sink_tokens,
        quantized=quantized,
        audio=False,
        attended=sink_of,
        value_bytes=work.value_bytes,
    )
    sink_residual = share.sink_tokens * config.dim * FLOAT32_BYTES
    # Of a streamed layer, while it runs, beside its slot.
    copies = max((sizes.layers[index].copies(work.dtype) for index in placement.streamed_layers), default=0)
    return {
        "load_dit": _loading_peak(sizes, work, placement, parts),
        "prefill_sink": parts.total + sink_residual + max(sink.embed, copies + sink.layer),
        "denoise": parts.total + max(block.embed, copies + block.layer),
    }


def _loading_peak(sizes: ModelSizes, work: Workload, placement: Placement, parts: DeviceParts) -> int:
    """Once everything is there, what goes before the first block included; or while weights are loaded, which comes
    before slots and rings."""
    whole = parts.total - parts.decoder_cache + allocated(sizes.start.bound(work.dtype))
    return max(whole, loading([sizes.start, sizes.shared, *resident(sizes, placement)], work.dtype) + parts.sink)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostParts:
    """Host bytes. The artifact's file is mapped and read through the page cache, which the system takes back when it
    wants to: it is not counted, except for a text encoder that computes from there."""

    base: int
    pinned_weights: int
    pinned_rings: int
    pinned_cache: int
    text_encoder: int
    voice_encoder: int
    held: int = 0
    """What every video loads anew from, where weights stay for a next one."""

    @property
    def peak(self) -> int:
        """The text encoder is gone before anything is pinned, and before a long voice is gone on with. That of a later
        video comes beside what is pinned, where weights stay: it is not counted, as the system may take back most of
        it, which is mapped from a file."""
        pinned = self.pinned_weights + self.pinned_rings + self.pinned_cache
        return self.base + self.held + max(pinned + self.voice_encoder, self.text_encoder)


def host_parts(
    sizes: ModelSizes, work: Workload, placement: Placement, text_device: str, share: Share, *, resident: bool = False
) -> HostParts:
    """Of one rank's process; what it streams lies there once for all ranks of a machine. A text encoder computes in
    float32 there, and so does the audio encoder, which stays beside everything else for the windows of a long voice."""
    cell = ring_costs(sizes.config, work, placement.kv, share).cell
    return HostParts(
        base=HOST_BASE_BYTES,
        pinned_weights=pinned_weights(sizes, placement.streamed_layers),
        pinned_rings=len(placement.host_rings) * round_up(cell, _PAGE),
        pinned_cache=workspace.decoder_cache(sizes.vae_base_dim, work) if share.media else 0,
        text_encoder=sum(slab.bound(torch.float32) for slab in sizes.text)
        if share.media and text_device == "cpu"
        else 0,
        voice_encoder=sizes.audio.parameters * FLOAT32_BYTES
        + workspace.audio_workspace(sizes.audio, workspace.WINDOW_S)
        if share.media and work.voice_on_host
        else 0,
        held=_held(sizes) if resident else 0,
    )


def _held(sizes: ModelSizes) -> int:
    return sizes.vae_bytes + sizes.start.nbytes + sizes.audio.parameters * FLOAT32_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineParts:
    """Host bytes of all ranks of one machine: what they stream lies there once. ``beside_text`` is what the other ranks
    may have pinned already while one of them runs the text encoder on the host."""

    base: int
    pinned_weights: int
    pinned_rings: int
    pinned_cache: int
    text_encoder: int
    voice_encoder: int
    beside_text: int

    @property
    def pinned(self) -> int:
        return self.pinned_weights + self.pinned_rings + self.pinned_cache

    @property
    def peak(self) -> int:
        return self.base + max(self.pinned + self.voice_encoder, self.text_encoder + self.beside_text)


def machine_parts(sizes: ModelSizes, ranks: Sequence[HostParts], streamed: Sequence[tuple[int, ...]]) -> MachineParts:
    """Of a machine's ``ranks``, and the layers that each of them streams."""
    reading = [bool(rank.text_encoder) for rank in ranks]
    others = [rank for rank, reads in zip(ranks, reading, strict=True) if not reads]
    streamed_by_others = {
        index for layers, reads in zip(streamed, reading, strict=True) if not reads for index in layers
    }
    kept = sum(rank.pinned_rings + rank.pinned_cache for rank in others)
    return MachineParts(
        base=sum(rank.base for rank in ranks),
        pinned_weights=pinned_weights(sizes, {index for layers in streamed for index in layers}),
        pinned_rings=sum(rank.pinned_rings for rank in ranks),
        pinned_cache=sum(rank.pinned_cache for rank in ranks),
        text_encoder=sum(rank.text_encoder for rank in ranks),
        voice_encoder=sum(rank.voice_encoder for rank in ranks),
        beside_text=pinned_weights(sizes, streamed_by_others) + kept if any(reading) else 0,
    )


def pinned_weights(sizes: ModelSizes, streamed: Iterable[int]) -> int:
    """Bytes of the layers ``streamed`` on the host."""
    return sum(round_up(sizes.layer_bytes[index], _PAGE) for index in streamed)


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
        return sum(vars(self).values())


def reference_parts(sizes: ModelSizes, work: Workload) -> ReferenceParts:
    config, base_dim = sizes.config, sizes.vae_base_dim
    work = dataclasses.replace(work, dtype=torch.bfloat16)
    ring = ring_costs(config, work, "plain", whole(config, work))
    sink = kv_bytes(config, work.sink_tokens, "plain", config.num_heads, work.value_bytes)
    seen = work.ring_tokens + work.sink_tokens
    layer = workspace.layer_workspace(config, work.block_tokens, quantized=False, seen_tokens=seen)
    return ReferenceParts(
        dit=sizes.parameters * BFLOAT16_BYTES,
        kv_rings=ring.cells * ring.payload,
        sink=sink.payload * config.num_layers,
        text_encoder=sizes.text_parameters * BFLOAT16_BYTES,
        audio_encoder=sizes.audio.parameters * FLOAT32_BYTES,
        vae=sizes.vae_parameters * BFLOAT16_BYTES,
        workspace=workspace.decoder_cache(base_dim, work) + max(layer.peak, workspace.decode_workspace(base_dim, work)),
    )
