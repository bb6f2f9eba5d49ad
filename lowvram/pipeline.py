"""A portrait, a voice and a prompt in; frames out, block by block, without an end.

A frame's way reads downwards in ``AvatarPipeline.stream``. Shapes: C latent channels, F frames, h x w latent size,
H x W pixels.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowvram.decode import BlockDecoder, to_pixels
from lowvram.denoise.denoiser import Denoiser
from lowvram.denoise.rollout import Rollout
from lowvram.devices import choose_device, choose_dtype, computing_on, each_within
from lowvram.encode.conditions import Conditions, encode_audio, encode_image, encode_text
from lowvram.encode.voice import Voice, listening
from lowvram.loading.encoders import load_vae
from lowvram.offload.copy_engine import Engine
from lowvram.offload.oom import Layout, Relief
from lowvram.offload.placement import MemoryOptions
from lowvram.parallel.team import LatentSize, Solo, Team
from lowvram.planning.decide import LaidOut, lay_out
from lowvram.planning.workload import Workload
from lowvram.recorder import BlockRecord, Recorder
from lowvram.request import FPS, Inputs, Request, read_inputs
from lowvram.runtime import Runtime
from lowvram.schedule import Block, Extent, frames_to_denoise
from lowvram_kernels.errors import ConfigError
from lowvram_models.vae import DROPPED_FIRST_FRAMES
from lowvram_quantize.format import Artifact

Tensor = torch.Tensor
plan_log = logging.getLogger("lowvram.plan")


class AvatarPipeline:
    """Makes avatar videos from one artifact on one device, or one rank's part of them. See ``from_artifact`` and
    ``stream``."""

    def __init__(
        self,
        artifact: Artifact,
        device: torch.device,
        dtype: str = "auto",
        *,
        memory: MemoryOptions | None = None,
        team: Team | None = None,
        engine: Engine | None = None,
    ):
        self.runtime = Runtime(artifact, device, dtype, memory or MemoryOptions(), engine)
        self.team: Team = team or Solo()
        self.laid_out: LaidOut | None = None

    @classmethod
    def from_artifact(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        memory: MemoryOptions | None = None,
        team: Team | None = None,
        verify: bool = False,
    ) -> AvatarPipeline:
        """Open what ``convert`` wrote. Weights are read when a stage needs them.

        Args:
            path: the artifact's folder.
            device: auto, cpu, cuda or cuda:N.
            dtype: of what is not 8-bit: auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16.
            memory: budgets, and what is to be offloaded or kept in 8 bit; the default leaves it to the plan.
            team: the other ranks, where several share the work.
            verify: read every byte and compare the checksums first.

        Raises:
            CheckpointError: no artifact, a damaged one, or one of another format version.
            HardwareError: the device is not there.
        """
        where = choose_device(device)
        return cls(Artifact.open(Path(path), verify=verify), where, dtype, memory=memory, team=team)

    def stream(self, request: Request | Inputs, *, recorder: Recorder | None = None) -> Iterator[np.ndarray]:
        """Yield the video's frames, uint8 [k, H, W, 3], one block at a time as soon as it is decoded.

        All frames of all clips come; the last clip may go on behind the end of the audio, and ``Inputs.voice_frames``
        says how many are needed. Of several ranks, this is for the one that reads and writes; ``serve`` is for the
        others. The current CUDA device and PyTorch's switches
        for float32 are the caller's own between two blocks.
        """
        return each_within(self._computing, self._stream(request, recorder or Recorder()))

    def denoise(
        self, request: Request | Inputs, begun: Callable[[Rollout], None], *, recorder: Recorder | None = None
    ) -> Iterator[tuple[Block, Tensor]]:
        """Yield each block and its latent [C, F, h, w], float32, of which nothing is decoded; ``begun`` is shown the
        rollout before its first step. For a pipeline of one rank.

        Raises:
            ConfigError: there are other ranks.
        """
        if self.team.layout.world_size > 1:
            raise ConfigError(f"latents alone are asked of {self.team.layout.world_size} ranks; expected one")
        return each_within(self._computing, self._denoise(request, begun, recorder or Recorder()))

    def serve(self, request: Request) -> Iterator[Block]:
        """Do the part of a rank that neither reads nor writes; yields each block that has taken its steps here."""
        return each_within(self._computing, self._serve(request))

    def _computing(self) -> contextlib.AbstractContextManager[None]:
        return computing_on(self.runtime.device)

    def _stream(self, request: Request | Inputs, recorder: Recorder) -> Iterator[np.ndarray]:
        inputs = read_inputs(request) if isinstance(request, Request) else request
        conditions = self._conditions(inputs, recorder)
        with listening(conditions.audio):
            shared = self.team.share_conditions(conditions)
            yield from self._frames(inputs.request, inputs.latent_size, shared, recorder)

    def _conditions(self, inputs: Inputs, recorder: Recorder) -> Conditions:
        self.team.share("latent_size", inputs.latent_size)
        self.team.share("voice_on_host", inputs.voice_on_host)
        self._lay_out(inputs.request, inputs.latent_size, voice_on_host=inputs.voice_on_host)
        with self.team.doing("encoding portrait, voice and prompt", "encode"):
            return self._encode(inputs, recorder)

    def _denoise(
        self, request: Request | Inputs, begun: Callable[[Rollout], None], recorder: Recorder
    ) -> Iterator[tuple[Block, Tensor]]:
        inputs = read_inputs(request) if isinstance(request, Request) else request
        conditions, size = self._conditions(inputs, recorder), inputs.latent_size
        with listening(conditions.audio):
            denoiser = self._denoiser(inputs.request, size, conditions)
            begun(denoiser.rollout)
            extent = _extent(inputs.request, conditions)
            for block, latent in self._latents(extent, size, denoiser, denoiser.seconds):
                del denoiser.seconds[block.index]
                yield block, latent

    def _frames(
        self, request: Request, size: LatentSize, conditions: Conditions, recorder: Recorder
    ) -> Iterator[np.ndarray]:
        extent = _extent(request, conditions)
        denoiser = self._denoiser(request, size, conditions) if self.team.role.denoises else None
        seconds = denoiser.seconds if denoiser else {}
        latents = self._latents(extent, size, denoiser, seconds)
        decoder = BlockDecoder(self.runtime, conditions.motion, denoiser.give_way if denoiser else _nothing_else)
        recorder.started(conditions.audio.num_frames - DROPPED_FIRST_FRAMES)
        waiting: list[tuple[Block, Tensor]] = []
        for block, latent in latents:
            recorder.latent(block, latent)
            waiting.append((block, latent))
            if self.runtime.layout.online_decode or block.last_of_clip:
                yield from self._decode(decoder, waiting, seconds, recorder)
                waiting.clear()

    def _serve(self, request: Request) -> Iterator[Block]:
        height, width = self.team.share("latent_size", None)[self.team.layout.media_rank]
        size = height, width
        voice_on_host = bool(self.team.share("voice_on_host", None)[self.team.layout.media_rank])
        self._lay_out(request, size, voice_on_host=voice_on_host)
        conditions = self.team.share_conditions(None)
        with listening(conditions.audio):
            denoiser = self._denoiser(request, size, conditions)
            for block, _ in self._latents(_extent(request, conditions), size, denoiser, denoiser.seconds):
                del denoiser.seconds[block.index]
                yield block

    def _lay_out(self, request: Request, latent_size: LatentSize, *, voice_on_host: bool) -> None:
        """Decide where everything lies, before anything loads.

        Raises:
            OutOfMemoryError: it does not fit the budgets, and how much would.
        """
        runtime, team = self.runtime, self.team
        work = Workload(
            latent_size=latent_size,
            infer_frames=request.infer_frames,
            sample_steps=request.sample_steps,
            voice_on_host=voice_on_host,
            dtype=runtime.dtype,
        )
        self.laid_out = found = lay_out(runtime.artifact, work, runtime.device, runtime.memory, team)
        if team.role.media and found.plan is not None:
            plan_log.info("%s", found.summary())
        layout = Layout(placement=found.placement, online_decode=request.online_decode)
        layers = runtime.dit_config["num_layers"]
        runtime.relief = Relief(
            layout,
            layers=layers,
            steps=self._steps(request),
            allowed=runtime.memory.fallback,
            empty_cache=runtime.engine.empty_cache,
        )

    def _steps(self, request: Request) -> range:
        stage = self.team.role.stage
        return range(0) if stage is None else self.team.layout.steps(stage, request.sample_steps)

    def _encode(self, inputs: Inputs, recorder: Recorder) -> Conditions:
        runtime, request, device = self.runtime, inputs.request, self.runtime.device
        artifact, text_len = runtime.artifact, runtime.dit_config["text_len"]

        def text(device: torch.device) -> tuple[Tensor, Tensor]:
            return encode_text(artifact, request.prompt, text_len, device, choose_dtype(runtime.dtype_name, device))

        def frames(clips_in_audio: int) -> int:
            return frames_to_denoise(
                inputs.voice_frames,
                clips_in_audio=clips_in_audio,
                infer_frames=request.infer_frames,
                num_clip=request.num_clip,
                dropped=DROPPED_FIRST_FRAMES,
            )

        def audio(device: torch.device) -> Voice:
            note = functools.partial(recorder.part, "audio_emb")
            goes_on = inputs.speech_goes_on
            return encode_audio(artifact, inputs.speech, request.infer_frames, frames, device, note, goes_on=goes_on)

        def image(device: torch.device) -> tuple[Tensor, Tensor]:
            vae = load_vae(artifact, device, choose_dtype(runtime.dtype_name, device))
            return encode_image(vae, inputs.portrait.to(device))

        text_device = torch.device("cpu") if runtime.layout.placement.text_on_host else device
        relief = runtime.relief
        with runtime.stages.stage("encode_text"):
            ids, context = relief.on_host_instead("encode_text", text, text_device)
        with runtime.stages.stage("encode_audio"):
            voice = relief.on_host_instead("encode_audio", audio, device)
        with runtime.stages.stage("encode_image"):
            reference, motion = relief.on_host_instead("encode_image", image, device)
        # Models of libraries hold themselves in cycles: without this they would keep their memory.
        self.runtime.engine.empty_cache()
        recorder.tensor("input_ids", ids)
        recorder.tensor("context", context)
        recorder.tensor("ref_latents", reference[None])
        recorder.tensor("motion_latents", motion[None])
        return Conditions(context=context, audio=voice, reference=reference, motion=motion)

    def _denoiser(self, request: Request, latent_size: LatentSize, conditions: Conditions) -> Denoiser:
        return Denoiser(self.runtime, request, latent_size, conditions, self.team, self._steps(request))

    def _latents(
        self,
        extent: Extent,
        latent_size: LatentSize,
        denoiser: Denoiser | None,
        seconds: dict[int, float],
    ) -> Iterator[tuple[Block, Tensor]]:
        """Each block and its latent: denoised here, or by other ranks. Notes how long each took."""
        if denoiser is None:
            return _waited(self.team.arriving(extent.blocks(), latent_size), seconds)
        chain = self.team.chain(extent.blocks(), latent_size, clips=extent.clips_begun)
        return denoiser.run(extent.blocks(), chain)

    def _decode(
        self,
        decoder: BlockDecoder,
        waiting: list[tuple[Block, Tensor]],
        seconds: dict[int, float],
        recorder: Recorder,
    ) -> Iterator[np.ndarray]:
        for block, latent in waiting:
            begin = time.perf_counter()
            with self.team.doing(f"decoding block {block.index}", "decode"):
                frames, pixels = decoder.decode(block, latent)
            recorder.decoded(frames)
            record = BlockRecord(
                clip=block.clip,
                block=block.index,
                frames=len(pixels),
                denoise_s=seconds.pop(block.index),
                decode_s=time.perf_counter() - begin,
            )
            recorder.finished(record)
            yield pixels

    def memory_report(self) -> dict[str, Any]:
        """How the run was laid out, and the bytes that crossed between host and device."""
        return self.runtime.memory_report() | {"plan": self.laid_out.to_json() if self.laid_out else None}


def _waited(latents: Iterator[tuple[Block, Tensor]], seconds: dict[int, float]) -> Iterator[tuple[Block, Tensor]]:
    """Note how long each block was waited for, by its index."""
    begin = time.perf_counter()
    for block, latent in latents:
        seconds[block.index] = time.perf_counter() - begin
        yield block, latent
        begin = time.perf_counter()


def _extent(request: Request, conditions: Conditions) -> Extent:
    """What every rank has heard the length of with the conditions."""
    return Extent.of(conditions.audio.num_frames, request.infer_frames)


def _nothing_else(layout: Layout) -> None:
    """Only the VAE is on the device."""


__all__ = ["FPS", "AvatarPipeline", "Inputs", "Request", "read_inputs", "to_pixels"]
