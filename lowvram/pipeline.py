"""A portrait, a voice and a prompt in; frames out, block by block, without an end.

A frame's way reads downwards in ``AvatarPipeline.stream``. Shapes: C latent channels, F frames, h x w latent size,
H x W pixels.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowvram.conditions import Conditions, encode_audio, encode_image, encode_text
from lowvram.decoder_backup import DecoderBackup
from lowvram.devices import choose_device, choose_dtype
from lowvram.encoders import load_vae
from lowvram.engine import Engine, engine_for
from lowvram.fallback import Layout
from lowvram.laying_out import lay_out
from lowvram.placement import MemoryOptions, Placement
from lowvram.planning.planner import Plan
from lowvram.planning.table import to_json as plan_json
from lowvram.planning.workload import Workload
from lowvram.recorder import BlockRecord, Recorder
from lowvram.relief import Relief, free_cached
from lowvram.request import FPS, Inputs, Request, read_inputs
from lowvram.residency import Layers
from lowvram.rollout import Rollout, RolloutSettings
from lowvram.schedule import (
    VIDEO_FRAMES_PER_LATENT,
    Block,
    Tick,
    blocks_of,
    clip_noise,
    latent_frames_per_clip,
    ticks,
)
from lowvram.stages import StageLog
from lowvram.weights import build_dit, check_complete, drop_start, load_shared
from lowvram_kernels.trace import trace_kernels
from lowvram_models.vae import DROPPED_FIRST_FRAMES, PRIMING_LATENTS, StreamingDecoder
from lowvram_quantize.format import Artifact

Tensor = torch.Tensor
plan_log = logging.getLogger("lowvram.plan")

LATENT_CHANNELS = 16


class AvatarPipeline:
    """Makes avatar videos from one artifact on one device. See ``from_artifact`` and ``stream``."""

    def __init__(
        self,
        artifact: Artifact,
        device: torch.device,
        dtype: str = "auto",
        *,
        memory: MemoryOptions | None = None,
    ):
        self.artifact, self.device = artifact, device
        self.dtype_name, self.dtype = dtype, choose_dtype(dtype, device)
        self.memory = memory or MemoryOptions()
        self.engine: Engine = engine_for(device)
        self.stages = StageLog(device)
        self.plan: Plan | None = None
        self.relief: Relief
        self._denoise_s: dict[int, float] = {}
        self.kernels: dict[tuple[str, str], int] = {}

    @classmethod
    def from_artifact(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        memory: MemoryOptions | None = None,
        verify: bool = False,
    ) -> AvatarPipeline:
        """Open what ``convert`` wrote. Weights are read when a stage needs them.

        Args:
            path: the artifact's folder.
            device: auto, cpu, cuda or cuda:N.
            dtype: of what is not 8-bit: auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16.
            memory: budgets, and what is to be offloaded or kept in 8 bit; the default leaves it to the plan.
            verify: read every byte and compare the checksums first.

        Raises:
            CheckpointError: no artifact, a damaged one, or one of another format version.
            HardwareError: the device is not there.
        """
        where = choose_device(device)
        return cls(Artifact.open(Path(path), verify=verify), where, dtype, memory=memory)

    def stream(self, request: Request | Inputs, *, recorder: Recorder | None = None) -> Iterator[np.ndarray]:
        """Yield the video's frames, uint8 [k, H, W, 3], one block at a time as soon as it is decoded.

        All frames of all clips come; the last clip may go on behind the end of the audio.
        """
        recorder = recorder or Recorder()
        inputs = read_inputs(request) if isinstance(request, Request) else request
        request, steps = inputs.request, inputs.request.sample_steps
        self.relief = relief = self._lay_out(inputs)
        conditions = self._encode(inputs, recorder)
        rollout = self._start_rollout(inputs, conditions)
        self._fill_sink(rollout, conditions.reference, conditions.motion)
        decoder = self._start_decoder(rollout, conditions)
        backup = DecoderBackup(self.engine, decoder)
        if self.memory.fallback:
            backup.save()
        clips = self._clips(inputs, conditions)
        recorder.started(clips * request.infer_frames - DROPPED_FIRST_FRAMES)
        reference = conditions.reference
        waiting: list[tuple[Block, Tensor]] = []
        for tick in ticks(blocks_of(clips, rollout.settings.frames_per_clip), steps, relief.layout.placement.wave):
            if tick.refresh:
                # From the second clip on, the first frame that was generated stands for the portrait.
                self._fill_sink(rollout, reference, conditions.motion)
            self._denoise(rollout, tick, conditions)
            block = tick.finished(steps)
            if block is None:
                continue
            latent = rollout.finish(block)
            recorder.latent(block, latent)
            if block.index == 0:
                reference = latent[:, :1]
            waiting.append((block, latent))
            if relief.layout.online_decode or block.last_of_clip:
                yield from self._decode(rollout, decoder, backup, waiting, recorder)
                waiting.clear()

    def _lay_out(self, inputs: Inputs) -> Relief:
        """Decide where everything lies, before anything loads.

        Raises:
            OutOfMemoryError: it does not fit the budgets, and how much would.
        """
        request = inputs.request
        layers = self.artifact.component("dit").config["num_layers"]
        work = Workload(
            latent_size=inputs.latent_size, infer_frames=request.infer_frames, sample_steps=request.sample_steps
        )
        self.plan, placement = lay_out(self.artifact, work, self.device, self.memory, layers)
        if self.plan is not None:
            plan_log.info("%s", self.plan.summary())
        layout = Layout(placement=placement, online_decode=request.online_decode)
        return Relief(layout, layers=layers, steps=request.sample_steps, allowed=self.memory.fallback)

    def _encode(self, inputs: Inputs, recorder: Recorder) -> Conditions:
        request, text_len = inputs.request, self.artifact.component("dit").config["text_len"]

        def text(device: torch.device) -> tuple[Tensor, Tensor]:
            return encode_text(self.artifact, request.prompt, text_len, device, choose_dtype(self.dtype_name, device))

        def audio(device: torch.device) -> Tensor:
            return encode_audio(self.artifact, inputs.speech, request.infer_frames, device)

        def image(device: torch.device) -> tuple[Tensor, Tensor]:
            vae = load_vae(self.artifact, device, choose_dtype(self.dtype_name, device))
            return encode_image(vae, inputs.portrait.to(device))

        text_device = torch.device("cpu") if self.relief.layout.placement.text_on_host else self.device
        with self.stages.stage("encode_text"):
            ids, context = self.relief.on_host_instead("encode_text", text, text_device)
        with self.stages.stage("encode_audio"):
            features = self.relief.on_host_instead("encode_audio", audio, self.device)
        with self.stages.stage("encode_image"):
            reference, motion = self.relief.on_host_instead("encode_image", image, self.device)
        # Models of libraries hold themselves in cycles: without this they would keep their memory.
        free_cached()
        recorder.tensor("input_ids", ids)
        recorder.tensor("context", context)
        recorder.tensor("audio_emb", features)
        recorder.tensor("ref_latents", reference[None])
        recorder.tensor("motion_latents", motion[None])
        return Conditions(context=context, audio=features, reference=reference, motion=motion)

    def _start_rollout(self, inputs: Inputs, conditions: Conditions) -> Rollout:
        def load() -> Rollout:
            with self.stages.stage("load_dit"):
                return self._rollout(inputs, conditions, self.relief.layout.placement)

        return self.relief.attempt("load_dit", load, _nothing_yet)

    def _rollout(self, inputs: Inputs, conditions: Conditions, placement: Placement) -> Rollout:
        request = inputs.request
        component = self.artifact.component("dit")
        dit = build_dit(component)
        check_complete(dit, component)
        load_shared(dit, component, self.device, self.dtype)
        settings = RolloutSettings(
            frames_per_clip=latent_frames_per_clip(request.infer_frames),
            latent_size=inputs.latent_size,
            sample_steps=request.sample_steps,
            base_seed=request.base_seed,
            cond_rope_distance=request.cond_rope_distance,
        )
        layers = Layers(dit, component, self.engine, self.dtype)
        rollout = Rollout(
            dit, layers, conditions.context, settings, dtype=self.dtype, engine=self.engine, placement=placement
        )
        drop_start(dit, component)
        return rollout

    def _fill_sink(self, rollout: Rollout, reference: Tensor, motion: Tensor) -> None:
        def fill() -> None:
            with self.stages.stage("prefill_sink"):
                rollout.prefill(reference, motion)

        self.relief.attempt("prefill_sink", fill, lambda layout: rollout.place(layout.placement))

    def _clips(self, inputs: Inputs, conditions: Conditions) -> int:
        in_audio = conditions.audio.shape[-1] // inputs.request.infer_frames
        return min(inputs.request.num_clip or in_audio, in_audio)

    def _start_decoder(self, rollout: Rollout, conditions: Conditions) -> StreamingDecoder:
        def start() -> StreamingDecoder:
            with self.stages.stage("decode"):
                found = load_vae(self.artifact, self.device, self.dtype).start_decoder()
                found.strips = self.relief.layout.vae_tiles
                found.prime(conditions.motion[:, :PRIMING_LATENTS])
                return found

        return self.relief.attempt("decode", start, lambda layout: rollout.place(layout.placement))

    def _denoise(self, rollout: Rollout, tick: Tick, conditions: Conditions) -> None:
        begin = time.perf_counter()

        def advance() -> None:
            with self.stages.stage("denoise"), trace_kernels() as kernels:
                if tick.starts is not None:
                    rollout.start(tick.starts, *_noise_and_audio(rollout.settings, tick.starts, conditions))
                rollout.advance(tick.items)
            self._count(kernels)

        self.relief.attempt("denoise", advance, lambda layout: rollout.place(layout.placement))
        share = (time.perf_counter() - begin) / len(tick.items)
        for block, _ in tick.items:
            self._denoise_s[block.index] = self._denoise_s.get(block.index, 0.0) + share

    def _decode(
        self,
        rollout: Rollout,
        decoder: StreamingDecoder,
        backup: DecoderBackup,
        waiting: list[tuple[Block, Tensor]],
        recorder: Recorder,
    ) -> Iterator[np.ndarray]:
        for block, latent in waiting:
            begin = time.perf_counter()
            frames, pixels = self._decode_block(rollout, decoder, backup, block, latent)
            recorder.decoded(frames)
            record = BlockRecord(
                clip=block.clip,
                block=block.index,
                frames=len(pixels),
                denoise_s=self._denoise_s.pop(block.index),
                decode_s=time.perf_counter() - begin,
            )
            recorder.finished(record)
            yield pixels

    def _decode_block(
        self, rollout: Rollout, decoder: StreamingDecoder, backup: DecoderBackup, block: Block, latent: Tensor
    ) -> tuple[Tensor, np.ndarray]:
        def decode() -> tuple[Tensor, np.ndarray]:
            with self.stages.stage("decode"), trace_kernels() as kernels:
                frames = decoder.decode(latent)[:, DROPPED_FIRST_FRAMES if block.index == 0 else 0 :]
                pixels = to_pixels(frames)
            self._count(kernels)
            return frames, pixels

        def give_way(layout: Layout) -> None:
            rollout.place(layout.placement)
            decoder.strips = layout.vae_tiles
            backup.restore()

        backup.before_decoding()
        decoded = self.relief.attempt("decode", decode, give_way)
        if self.memory.fallback:
            backup.save()
        return decoded

    def memory_report(self) -> dict[str, Any]:
        """How the run was laid out, and the bytes that crossed between host and device."""
        layout = self.relief.layout if self.relief else None
        return {
            "options": dataclasses.asdict(self.memory),
            "plan": plan_json(self.plan) if self.plan else None,
            "layout": dataclasses.asdict(layout) if layout else None,
            "given_up": self.relief.events if self.relief else [],
            "bytes_in": self.engine.bytes_in,
            "bytes_out": self.engine.bytes_out,
        }

    def _count(self, kernels: dict[tuple[str, str], int]) -> None:
        for key, count in kernels.items():
            self.kernels[key] = self.kernels.get(key, 0) + count


def _nothing_yet(layout: Layout) -> None:
    """What failed is built anew from the layout: nothing has to move."""


def _noise_and_audio(settings: RolloutSettings, block: Block, conditions: Conditions) -> tuple[Tensor, Tensor]:
    shape = (LATENT_CHANNELS, settings.frames_per_clip, *settings.latent_size)
    noise = clip_noise(settings.base_seed, block.clip, shape)[:, block.offset : block.offset + block.frames]
    first = block.first_frame * VIDEO_FRAMES_PER_LATENT
    return noise, conditions.audio[..., first : first + block.frames * VIDEO_FRAMES_PER_LATENT]


def to_pixels(frames_CFHW: Tensor) -> np.ndarray:
    """[3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]."""
    scaled = frames_CFHW.float().clamp(-1, 1).add(1).mul(127.5).round()
    pixels: np.ndarray = scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return pixels


__all__ = ["FPS", "AvatarPipeline", "Inputs", "Request", "read_inputs"]
