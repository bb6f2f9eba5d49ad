"""Conditions of the DiT from prompt, voice and portrait. An encoder is loaded for its stage and let go after it; each
works on the device or, where it does not fit there, on the host."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from lowvram.devices import choose_dtype
from lowvram.encode.voice import BackgroundPieces, Voice, VoiceInWindows, WholeVoice, together
from lowvram.loading.encoders import load_audio_encoder, load_text_encoder, load_vae
from lowvram.media.pose import pose_clips
from lowvram.recorder import Recorder
from lowvram.request import Inputs
from lowvram.runtime import Run
from lowvram.schedule import frames_to_denoise
from lowvram_models.audio_encoder import audio_embedding, extract_features, num_clips
from lowvram_models.constants import DROPPED_FIRST_FRAMES
from lowvram_models.long_voice import LongVoice, Windowing, count_features
from lowvram_models.text_encoder import encode_prompt, tokenize_prompt
from lowvram_quantize.format import Artifact

if TYPE_CHECKING:
    from lowvram_models.vae import StreamingVAE

Tensor = torch.Tensor
WINDOWING = Windowing()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditions:
    """``context`` [tokens, text_dim], ``audio`` [people, 25, audio_dim, frames] of any video frames, ``reference``
    [16, 1, h, w] and ``motion`` [16, 19, h, w] latents. Of several people ``masks`` [people, tokens of a latent frame]
    say where each is heard; ``pose`` [16, F, h, w], float32 on the host, are latents of all F frames, where poses are
    followed."""

    context: Tensor
    audio: Voice
    reference: Tensor
    motion: Tensor
    masks: Tensor | None = None
    pose: Tensor | None = None


@torch.inference_mode()
def encode_text(
    artifact: Artifact, prompt: str, text_len: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Prompt -> (token ids [1, text_len], context [valid tokens, text_dim])."""
    model, tokenizer = load_text_encoder(artifact, device, dtype)
    ids, _ = tokenize_prompt(tokenizer, prompt, text_len)
    return ids, encode_prompt(model, tokenizer, prompt, text_len)


@torch.inference_mode()
def encode_audio(
    artifact: Artifact,
    speech: np.ndarray,
    infer_frames: int,
    frames_of: Callable[[int], int],
    device: torch.device,
    note: Callable[[Tensor], None],
    *,
    goes_on: bool = False,
    first_frame: int = 0,
) -> Voice:
    """Speech (mono float32, 16 kHz) -> features of each video frame, float32. ``frames_of`` says how many frames are
    made of so many clips of ``infer_frames`` as the voice has. Those before ``first_frame`` are not asked for.

    Of a voice that is long (``WINDOWING``), or that ``goes_on`` behind the speech, only the first window is encoded
    here: the others are as the frames need them, on the host. ``note`` is shown the features of all clips, or of each
    window when it is there.

    wav2vec2 runs in float32 everywhere: it is small, and its features steer the lips.
    """
    model, do_normalize = load_audio_encoder(artifact, device)
    if not (goes_on or WINDOWING.is_long(len(speech))):
        hidden = extract_features(model, speech, do_normalize=do_normalize)
        features = audio_embedding(hidden, infer_frames).cpu()
        note(features)
        return WholeVoice(fit_audio(features, frames_of(features.shape[-1] // infer_frames)))
    frames = frames_of(num_clips(count_features(model.config, len(speech)), infer_frames))
    voice = LongVoice(model.config, speech, frames, do_normalize=do_normalize, windowing=WINDOWING, goes_on=goes_on)
    index = next(index for index, window in enumerate(voice.windows) if first_frame < window.last)
    before = voice.encode(model, voice.windows[index - 1], None)[1] if index else None
    first = voice.encode(model, voice.windows[index], before)
    pieces = BackgroundPieces(
        voice, first, lambda: load_audio_encoder(artifact, torch.device("cpu"))[0], note, index=index
    )
    return VoiceInWindows([window.last for window in voice.windows], pieces, index=index)


def fit_audio(features: Tensor, frames: int) -> Tensor:
    """Features [1, 25, audio_dim, N] of the first ``frames`` video frames: cut, or gone on with zeros, which are what
    the reference takes behind the end of a voice."""
    return torch.nn.functional.pad(features, (0, max(frames - features.shape[-1], 0)))[..., :frames]


@torch.inference_mode()
def encode_image(vae: StreamingVAE, portrait_3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Portrait [3, H, W] in [-1, 1] -> reference latents [16, 1, h, w] and motion latents [16, 19, h, w]."""
    return vae.encode(portrait_3HW[:, None]), vae.encode_repeated(portrait_3HW)


@torch.inference_mode()
def encode_pose(vae: StreamingVAE, inputs: Inputs, num_frames: int, device: torch.device) -> Tensor:
    """Latents [16, F, h, w], float32 on the host, of the pose video's pictures at the first ``num_frames`` video
    frames, each clip for itself with its first picture shown before it.

    Source: the reference's pose conditions.
    """
    request, (height, width) = inputs.request, inputs.portrait.shape[1:]
    assert request.pose_video is not None
    clips, clip_frames = -(-num_frames // request.infer_frames), request.infer_frames
    latents = []
    for pictures in pose_clips(request.pose_video, clips, clip_frames, height, width):
        shown = torch.cat([pictures[:, :1], pictures], dim=1)
        latents.append(vae.encode(shown.to(device))[:, 1:].float().cpu())
    return torch.cat(latents, dim=1)


def _voice(run: Run, inputs: Inputs, person: int, recorder: Recorder, first_frame: int) -> Voice:
    name = "audio_emb" if person == 0 else f"audio_emb.{person}"
    note, frames_of = functools.partial(recorder.part, name), functools.partial(_frames, inputs)
    for where, attempt in run.ladder.devices("encode_audio", run.runtime.device):
        with attempt:
            voice = encode_audio(
                run.runtime.artifact,
                inputs.speeches[person],
                inputs.request.infer_frames,
                frames_of,
                where,
                note,
                goes_on=inputs.speech_goes_on,
                first_frame=first_frame,
            )
    return voice


def encode_inputs(run: Run, inputs: Inputs, recorder: Recorder, *, first_frame: int = 0) -> Conditions:
    """What all blocks are denoised from; ``recorder`` sees every part of it. The voice is not asked for before
    ``first_frame``, which counts those that are dropped.

    Raises:
        OutOfMemoryError: an encoder does not fit on the device, and may not run on the host instead.
    """
    runtime, request, ladder = run.runtime, inputs.request, run.ladder
    artifact = runtime.artifact
    with runtime.stages.stage("encode_text"):
        ids, context = _prompt(run, request.prompt)
    with runtime.stages.stage("encode_audio"):
        voice = together([_voice(run, inputs, person, recorder, first_frame) for person in range(len(inputs.speeches))])
    with runtime.stages.stage("encode_image"):
        for where, attempt in ladder.devices("encode_image", runtime.device):
            with attempt:
                vae = functools.partial(load_vae, artifact, where, choose_dtype(runtime.dtype_name, where))
                reference, motion = encode_image(vae(), inputs.portrait.to(where))
    pose = None
    if request.pose_video is not None:
        with runtime.stages.stage("encode_pose"):
            for where, attempt in ladder.devices("encode_pose", runtime.device):
                with attempt:
                    vae = functools.partial(load_vae, artifact, where, choose_dtype(runtime.dtype_name, where))
                    pose = encode_pose(vae(), inputs, voice.num_frames, where)
    # Models of libraries hold themselves in cycles: without this they would keep their memory.
    runtime.engine.empty_cache()
    recorder.tensor("input_ids", ids)
    recorder.tensor("context", context)
    recorder.tensor("ref_latents", reference[None])
    recorder.tensor("motion_latents", motion[None])
    return Conditions(context=context, audio=voice, reference=reference, motion=motion, masks=inputs.masks, pose=pose)


def _prompt(run: Run, prompt: str) -> tuple[Tensor, Tensor]:
    """As ``encode_text``, or as an earlier video had it."""
    runtime, kept, placement = run.runtime, run.runtime.kept, run.rung.placement
    if kept is not None and (known := kept.prompt(prompt)) is not None:
        return known
    beside_weights = kept is not None and kept.model is not None
    on_host = placement.later_text_on_host if beside_weights else placement.text_on_host
    for where, attempt in run.ladder.devices("encode_text", torch.device("cpu") if on_host else runtime.device):
        with attempt:
            dtype, text_len = choose_dtype(runtime.dtype_name, where), runtime.dit_config["text_len"]
            ids, context = encode_text(runtime.artifact, prompt, text_len, where, dtype)
    if kept is not None:
        kept.remember(prompt, ids, context)
    return ids, context


def _frames(inputs: Inputs, clips_in_audio: int) -> int:
    """Video frames to make of a voice of so many clips."""
    return frames_to_denoise(
        inputs.voice_frames,
        clips_in_audio=clips_in_audio,
        infer_frames=inputs.request.infer_frames,
        num_clip=inputs.request.num_clip,
        dropped=DROPPED_FIRST_FRAMES,
    )
