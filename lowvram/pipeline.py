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

import numpy as np
import torch

from lowvram.conditions import Conditions, encode_audio, encode_image, encode_text
from lowvram.encoders import load_vae
from lowvram.media.audio import check_duration, load_speech
from lowvram.media.image import load_portrait, portrait_tensor
from lowvram.media.sizes import output_size
from lowvram.recorder import BlockRecord, Recorder
from lowvram.residency import LayerStore, Resident, Streamed
from lowvram.rollout import (
    FRAMES_PER_BLOCK,
    VIDEO_FRAMES_PER_LATENT,
    Block,
    Rollout,
    RolloutSettings,
    blocks_of,
    clip_noise,
    latent_frames_per_clip,
)
from lowvram.stages import StageLog
from lowvram.weights import build_dit, check_complete, load_shared
from lowvram_kernels.errors import ConfigError, HardwareError
from lowvram_kernels.trace import trace_kernels
from lowvram_models.vae import DROPPED_FIRST_FRAMES, PRIMING_LATENTS, StreamingDecoder, StreamingVAE
from lowvram_quantize.format import Artifact

Tensor = torch.Tensor
log = logging.getLogger(__name__)

FPS = 25
LATENT_CHANNELS = 16
PIXELS_PER_LATENT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to make. ``size`` names an area "A*B"; the portrait decides the shape. Validated at construction.

    ``num_clip`` None means as many clips of ``infer_frames`` video frames as the audio fills.
    ``online_decode`` False decodes a clip at a time instead of a block at a time.
    """

    image: Path
    audio: Path
    prompt: str
    size: str = "704*384"
    infer_frames: int = 48
    num_clip: int | None = None
    sample_steps: int = 4
    base_seed: int = 420
    cond_rope_distance: int | str = 30
    online_decode: bool = True

    def __post_init__(self) -> None:
        latent_frames_per_clip(self.infer_frames)
        if self.num_clip is not None and self.num_clip < 1:
            raise ConfigError(f"--num_clip is {self.num_clip}; expected 1 or more, or none for the whole audio")
        if not 1 <= self.sample_steps <= 1000:
            raise ConfigError(f"--sample_steps is {self.sample_steps}; expected 1 to 1000, 4 is what the model is for")
        if not 0 <= self.base_seed < 2**63 - 2**32:
            raise ConfigError(f"--base_seed is {self.base_seed}; expected a whole number from 0 to about 9e18")
        distance = self.cond_rope_distance
        if distance != "random" and not (isinstance(distance, int) and 0 <= distance <= 30):
            raise ConfigError(f"--cond-rope-distance is {distance!r}; expected 0 to 30, or random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """A request's files, read: portrait [3, H, W] in [-1, 1] and speech, mono float32 at 16 kHz."""

    request: Request
    portrait: Tensor
    speech: np.ndarray

    @property
    def latent_size(self) -> tuple[int, int]:
        height, width = self.portrait.shape[1:]
        return height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT


def read_inputs(request: Request) -> Inputs:
    """Read and check portrait and voice; cheap, so that bad input is told before any model loads.

    Raises:
        InputError: a file is missing, is not what it should be, or is too small, large, short or silent.
    """
    speech = load_speech(request.audio)
    check_duration(speech, FRAMES_PER_BLOCK * VIDEO_FRAMES_PER_LATENT, FPS)
    image = load_portrait(request.image)
    height, width = output_size(request.size, image.height, image.width)
    return Inputs(request=request, portrait=portrait_tensor(image, height, width), speech=speech)


def choose_device(name: str) -> torch.device:
    """Raises: HardwareError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise HardwareError(f"--device is {name!r}; expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise HardwareError(f"--device is {name!r}; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise HardwareError(f"--device is {name!r}, but {torch.cuda.device_count()} CUDA devices are here; try cpu")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype of everything that is not 8-bit: bfloat16 on GPUs; float32 on CPUs, most of which compute bf16 slower."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise ConfigError(f"--dtype is {name!r}; expected auto, float32 or bfloat16")
    return known[name]


class AvatarPipeline:
    """Makes avatar videos from one artifact on one device. See ``from_artifact`` and ``stream``."""

    def __init__(
        self,
        artifact: Artifact,
        device: torch.device,
        dtype: torch.dtype,
        *,
        offload_model: bool,
        offload_kv_cache: bool,
    ):
        self.artifact, self.device, self.dtype = artifact, device, dtype
        self.offload_model, self.offload_kv_cache = offload_model, offload_kv_cache
        self.stages = StageLog(device)
        self.kernels: dict[tuple[str, str], int] = {}

    @classmethod
    def from_artifact(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        offload_model: bool = False,
        offload_kv_cache: bool = False,
        verify: bool = False,
    ) -> AvatarPipeline:
        """Open what ``convert`` wrote. Weights are read when a stage needs them.

        Args:
            path: the artifact's folder.
            device: auto, cpu, cuda or cuda:N.
            dtype: of what is not 8-bit: auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16.
            offload_model: keep the DiT's layers in the mapped artifact and copy each to the device as it runs.
            offload_kv_cache: keep the KV rings in host memory.
            verify: read every byte and compare the checksums first.

        Raises:
            CheckpointError: no artifact, a damaged one, or one of another format version.
            HardwareError: the device is not there.
        """
        where = choose_device(device)
        if offload_kv_cache and where.type == "cpu":
            log.warning("--offload_kv_cache has no effect on the CPU: the rings are in host memory anyway")
        return cls(
            Artifact.open(Path(path), verify=verify),
            where,
            choose_dtype(dtype, where),
            offload_model=offload_model,
            offload_kv_cache=offload_kv_cache,
        )

    def stream(self, request: Request | Inputs, *, recorder: Recorder | None = None) -> Iterator[np.ndarray]:
        """Yield the video's frames, uint8 [k, H, W, 3], one block at a time as soon as it is decoded.

        All frames of all clips come; the last clip may go on behind the end of the audio.
        """
        recorder = recorder or Recorder()
        inputs = read_inputs(request) if isinstance(request, Request) else request
        conditions, vae = self._encode(inputs, recorder)
        with self.stages.stage("load_dit"):
            rollout = self._rollout(inputs, conditions)
        with self.stages.stage("prefill_sink"):
            rollout.prefill(conditions.reference, conditions.motion)
        decoder = self._start_decoder(vae, conditions)
        clips = self._clips(inputs, conditions)
        recorder.started(clips * inputs.request.infer_frames - DROPPED_FIRST_FRAMES)
        reference = conditions.reference
        waiting: list[tuple[Block, Tensor, float]] = []
        for block in blocks_of(clips, rollout.settings.frames_per_clip):
            if block.clip == 1 and block.offset == 0:
                # From the second clip on, the first frame that was generated stands for the portrait.
                with self.stages.stage("prefill_sink"):
                    rollout.prefill(reference, conditions.motion)
            latent, seconds = self._denoise(rollout, block, conditions, recorder)
            if block.index == 0:
                reference = latent[:, :1]
            waiting.append((block, latent, seconds))
            if inputs.request.online_decode or block.last_of_clip:
                yield from self._decode(decoder, waiting, recorder)
                waiting.clear()

    def _encode(self, inputs: Inputs, recorder: Recorder) -> tuple[Conditions, StreamingVAE]:
        request, text_len = inputs.request, self.artifact.component("dit").config["text_len"]
        with self.stages.stage("encode_text"):
            ids, context = encode_text(self.artifact, request.prompt, text_len, self.device, self.dtype)
        with self.stages.stage("encode_audio"):
            audio = encode_audio(self.artifact, inputs.speech, request.infer_frames, self.device)
        with self.stages.stage("encode_image"):
            vae = load_vae(self.artifact, self.device, self.dtype)
            reference, motion = encode_image(vae, inputs.portrait.to(self.device))
        recorder.tensor("input_ids", ids)
        recorder.tensor("context", context)
        recorder.tensor("audio_emb", audio)
        recorder.tensor("ref_latents", reference[None])
        recorder.tensor("motion_latents", motion[None])
        return Conditions(context=context, audio=audio, reference=reference, motion=motion), vae

    def _rollout(self, inputs: Inputs, conditions: Conditions) -> Rollout:
        request = inputs.request
        component = self.artifact.component("dit")
        dit = build_dit(component)
        check_complete(dit, component)
        load_shared(dit, component, self.device, self.dtype)
        store = Streamed if self.offload_model else Resident
        layers: LayerStore = store(dit, component, self.device, self.dtype)
        settings = RolloutSettings(
            frames_per_clip=latent_frames_per_clip(request.infer_frames),
            latent_size=inputs.latent_size,
            sample_steps=request.sample_steps,
            base_seed=request.base_seed,
            cond_rope_distance=request.cond_rope_distance,
            rings_device=torch.device("cpu") if self.offload_kv_cache else None,
        )
        return Rollout(dit, layers, conditions.context, settings, dtype=self.dtype, device=self.device)

    def _clips(self, inputs: Inputs, conditions: Conditions) -> int:
        in_audio = conditions.audio.shape[-1] // inputs.request.infer_frames
        return min(inputs.request.num_clip or in_audio, in_audio)

    def _start_decoder(self, vae: StreamingVAE, conditions: Conditions) -> StreamingDecoder:
        with self.stages.stage("decode"):
            decoder = vae.start_decoder()
            decoder.prime(conditions.motion[:, :PRIMING_LATENTS])
        return decoder

    def _denoise(
        self, rollout: Rollout, block: Block, conditions: Conditions, recorder: Recorder
    ) -> tuple[Tensor, float]:
        begin = time.perf_counter()
        per_clip = rollout.settings.frames_per_clip
        noise = clip_noise(
            rollout.settings.base_seed, block.clip, (LATENT_CHANNELS, per_clip, *rollout.settings.latent_size)
        )
        first = block.first_frame * VIDEO_FRAMES_PER_LATENT
        audio = conditions.audio[..., first : first + block.frames * VIDEO_FRAMES_PER_LATENT]
        with self.stages.stage("denoise"), trace_kernels() as kernels:
            latent = rollout.denoise(block, noise[:, block.offset : block.offset + block.frames], audio)
        self._count(kernels)
        recorder.latent(block, latent)
        return latent, time.perf_counter() - begin

    def _decode(
        self, decoder: StreamingDecoder, waiting: list[tuple[Block, Tensor, float]], recorder: Recorder
    ) -> Iterator[np.ndarray]:
        for block, latent, denoise_s in waiting:
            begin = time.perf_counter()
            with self.stages.stage("decode"), trace_kernels() as kernels:
                frames = decoder.decode(latent)
                frames = frames[:, DROPPED_FIRST_FRAMES if block.index == 0 else 0 :]
                pixels = to_pixels(frames)
            self._count(kernels)
            recorder.decoded(frames)
            decode_s = time.perf_counter() - begin
            recorder.finished(
                BlockRecord(
                    clip=block.clip, block=block.index, frames=len(pixels), denoise_s=denoise_s, decode_s=decode_s
                )
            )
            yield pixels

    def _count(self, kernels: dict[tuple[str, str], int]) -> None:
        for key, count in kernels.items():
            self.kernels[key] = self.kernels.get(key, 0) + count


def to_pixels(frames_CFHW: Tensor) -> np.ndarray:
    """[3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]."""
    scaled = frames_CFHW.float().clamp(-1, 1).add(1).mul(127.5).round()
    pixels: np.ndarray = scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return pixels


__all__ = ["AvatarPipeline", "Inputs", "Request", "read_inputs"]
