"""From a request's files to what the DiT is conditioned on. An encoder is loaded for its stage and let go after it."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from lowvram.encoders import load_audio_encoder, load_text_encoder
from lowvram_models.audio_encoder import audio_embedding, extract_features
from lowvram_models.text_encoder import encode_prompt, tokenize_prompt
from lowvram_models.vae import StreamingVAE
from lowvram_quantize.format import Artifact

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditions:
    """``context`` [tokens, text_dim], ``audio`` [1, 25, audio_dim, video frames], ``reference`` [16, 1, h, w] and
    ``motion`` [16, 19, h, w] latents."""

    context: Tensor
    audio: Tensor
    reference: Tensor
    motion: Tensor


@torch.inference_mode()
def encode_text(
    artifact: Artifact, prompt: str, text_len: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Prompt -> (token ids [1, text_len], context [valid tokens, text_dim])."""
    model, tokenizer = load_text_encoder(artifact, device, dtype)
    ids, _ = tokenize_prompt(tokenizer, prompt, text_len)
    return ids, encode_prompt(model, tokenizer, prompt, text_len)


@torch.inference_mode()
def encode_audio(artifact: Artifact, speech: np.ndarray, infer_frames: int, device: torch.device) -> Tensor:
    """Speech (mono float32, 16 kHz) -> features of each video frame [1, 25, audio_dim, clips * infer_frames], float32.

    wav2vec2 runs in float32 everywhere: it is small, and its features steer the lips.
    """
    model, do_normalize = load_audio_encoder(artifact, device)
    hidden = extract_features(model, speech, do_normalize=do_normalize)
    return audio_embedding(hidden, infer_frames).cpu()


def fit_audio(features: Tensor, frames: int) -> Tensor:
    """Features [1, 25, audio_dim, N] of the first ``frames`` video frames: cut, or gone on with zeros, which are what
    the reference takes behind the end of a voice."""
    return torch.nn.functional.pad(features, (0, max(frames - features.shape[-1], 0)))[..., :frames]


@torch.inference_mode()
def encode_image(vae: StreamingVAE, portrait_3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Portrait [3, H, W] in [-1, 1] -> reference latents [16, 1, h, w] and motion latents [16, 19, h, w]."""
    return vae.encode(portrait_3HW[:, None]), vae.encode_repeated(portrait_3HW)
