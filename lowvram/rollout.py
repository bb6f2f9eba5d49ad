"""Denoising of blocks, one after another without an end; model-spec section 3.

Shapes: C latent channels, F latent frames, h x w latent size, T tokens a latent frame, A actors.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lowvram.residency import LayerStore
from lowvram.rings import KVRing, RingMemory, Sink, ring_window
from lowvram_kernels.errors import ConfigError
from lowvram_models.dit import CausalDiT, LayerInputs
from lowvram_models.rope import Rope, block_rope, condition_rope, reference_time

Tensor = torch.Tensor
log = logging.getLogger(__name__)

FRAMES_PER_BLOCK = 3
VIDEO_FRAMES_PER_LATENT = 4
SCHEDULER_SHIFT = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A block of latent frames: ``offset`` counts from its clip's start, ``first_frame`` from the video's."""

    clip: int
    index: int
    offset: int
    frames: int
    first_frame: int
    last_of_clip: bool


def latent_frames_per_clip(infer_frames: int) -> int:
    """Latent frames of a clip of ``infer_frames`` video frames behind 73 motion frames.

    Raises:
        ConfigError: ``infer_frames`` is no multiple of 4 from 12 on.
    """
    if infer_frames < 12 or infer_frames % 4:
        raise ConfigError(f"--infer_frames is {infer_frames}; expected a multiple of 4 from 12 on, 48 is usual")
    return (infer_frames + 76) // 4 - 19


def blocks_of(clips: int, frames_per_clip: int, frames_per_block: int = FRAMES_PER_BLOCK) -> Iterator[Block]:
    """All blocks in order; where a clip is no multiple of a block, its last block is shorter."""
    index = 0
    for clip in range(clips):
        for offset in range(0, frames_per_clip, frames_per_block):
            frames = min(frames_per_block, frames_per_clip - offset)
            yield Block(
                clip=clip,
                index=index,
                offset=offset,
                frames=frames,
                first_frame=clip * frames_per_clip + offset,
                last_of_clip=offset + frames == frames_per_clip,
            )
            index += 1


def clip_noise(base_seed: int, clip: int, shape_CFhw: tuple[int, int, int, int]) -> Tensor:
    """Noise of one clip from a CPU generator, so that a seed means the same video on any device."""
    return torch.randn(shape_CFhw, generator=torch.Generator("cpu").manual_seed(base_seed + clip))


def cond_rope_distance(setting: int | str, base_seed: int, block: int, step: int) -> int:
    """Distance between a block and the reference frame: fixed, or drawn from 4..30 for each call ("random").

    The draw depends on (seed, block, step) alone, so that the order in which calls run does not matter.
    """
    return random.Random(f"{base_seed}/{block}/{step}").randint(4, 30) if setting == "random" else int(setting)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """``latent_size`` is (h, w) of the latents; ``cond_rope_distance`` 0..30 or "random"."""

    frames_per_clip: int
    latent_size: tuple[int, int]
    sample_steps: int = 4
    base_seed: int = 420
    cond_rope_distance: int | str = 30
    rings_device: torch.device | None = None


class Rollout:
    """Holds what lives from block to block: schedule, sink and rings.

    ``layers`` makes a layer's weights present before it runs; ``dtype`` is that of the matrix products.
    ``on_prediction(block, step, velocity)`` sees every output of the DiT.
    """

    def __init__(
        self,
        dit: CausalDiT,
        layers: LayerStore,
        context: Tensor,
        settings: RolloutSettings,
        *,
        dtype: torch.dtype,
        device: torch.device,
        on_prediction: Callable[[Block, int, Tensor], None] | None = None,
    ):
        self.dit, self.layers, self.settings = dit, layers, settings
        self.dtype, self.device, self.on_prediction = dtype, device, on_prediction
        scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SCHEDULER_SHIFT)
        self.scheduler = scheduler
        self.scheduler.set_timesteps(settings.sample_steps)
        self.times = [self.dit.embed_time(float(t)) for t in self.scheduler.timesteps]
        self.zero_time = self.dit.embed_time(0.0)
        self.text = dit.embed_text(context.to(device, dtype))
        self.sink = Sink()
        self.rings = [self._new_ring() for _ in range(settings.sample_steps)]

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens of a latent frame as (rows, columns)."""
        height, width = self.settings.latent_size
        return height // 2, width // 2

    @property
    def tokens_per_frame(self) -> int:
        rows, columns = self.grid
        return rows * columns

    def _new_ring(self) -> KVRing:
        config = self.dit.config
        capacity = self.settings.frames_per_clip * self.tokens_per_frame
        where = self.settings.rings_device or self.device
        return KVRing(config.num_layers, capacity, config.num_heads, config.head_dim, self.dtype, where)

    @torch.inference_mode()
    def prefill(self, reference_C1hw: Tensor, motion_CFhw: Tensor) -> None:
        """Fill the sink from reference [C, 1, h, w] and motion latents [C, 19, h, w]; replaces what it held."""
        reference, motion = (t.to(self.device, self.dtype) for t in (reference_C1hw, motion_CFhw))
        x = self.dit.embed_conditions(reference, motion)
        rope = condition_rope(*self.grid, self.dit.config.head_dim).to(self.device)
        inputs = LayerInputs(time=self.zero_time, text=self.text, rope=rope, frames=1)
        sink = Sink()
        for index in range(self.dit.config.num_layers):
            self.layers.fetch(index)
            x = self.dit.layer(index, x, inputs, sink.recorder())
        self.sink = sink

    @torch.inference_mode()
    def denoise(
        self,
        block: Block,
        noise_CFhw: Tensor,
        audio_ASCT: Tensor,
        *,
        pose_CFhw: Tensor | None = None,
        actor_masks: Tensor | None = None,
    ) -> Tensor:
        """Turn a block's noise [C, F, h, w] into its latent (float32, same shape), by ``sample_steps`` Euler steps.

        ``audio`` [A, 25, audio_dim, 4 F] is this block's only; ``actor_masks`` [A, F, T, 1].
        """
        audio = self.dit.embed_audio(audio_ASCT.to(self.device, self.dtype))
        rope = block_rope(block.first_frame, block.frames, *self.grid, self.dit.config.head_dim).to(self.device)
        masks = None if actor_masks is None else actor_masks.to(self.device)
        latent = noise_CFhw.to(self.device, torch.float32)
        for step, time in enumerate(self.times):
            inputs = LayerInputs(
                time=time, text=self.text, rope=rope, frames=block.frames, audio=audio, actor_masks=masks
            )
            velocity = self._predict(block, step, latent, pose_CFhw, inputs)
            if self.on_prediction is not None:
                self.on_prediction(block, step, velocity)
            latent = self._euler(latent, velocity, step)
        return latent

    def _predict(self, block: Block, step: int, latent: Tensor, pose: Tensor | None, inputs: LayerInputs) -> Tensor:
        x = self.dit.embed_latent(latent.to(self.dtype), None if pose is None else pose.to(self.device, self.dtype))
        ring = self.rings[step]
        window = ring_window(block.first_frame, block.frames, self.tokens_per_frame, ring.capacity)
        sink_rope = self._sink_rope(block, step)
        for index in range(self.dit.config.num_layers):
            self.layers.fetch(index)
            memory = RingMemory(ring, self.sink, index, window, sink_rope)
            x = self.dit.layer(index, x, inputs, memory)
        return self.dit.predict(x, inputs.time, (block.frames, *self.grid), self.dtype)

    def _sink_rope(self, block: Block, step: int) -> Rope:
        distance = cond_rope_distance(self.settings.cond_rope_distance, self.settings.base_seed, block.index, step)
        time = reference_time(block.first_frame, distance)
        return condition_rope(*self.grid, self.dit.config.head_dim, reference_time=time).to(self.device)

    def _euler(self, latent: Tensor, velocity: Tensor, step: int) -> Tensor:
        self.scheduler._step_index = step
        return self.scheduler.step(velocity, self.scheduler.timesteps[step], latent).prev_sample

    def memory_bytes(self) -> dict[str, int]:
        return {"kv_rings": sum(ring.nbytes() for ring in self.rings), "sink": self.sink.nbytes()}


__all__ = ["Block", "Rollout", "RolloutSettings", "blocks_of", "clip_noise", "latent_frames_per_clip"]
