"""Audio encoder, a voice to one feature per video frame: wav2vec2's hidden states at 50 Hz, then 30 Hz, then 25 fps.

The network is transformers' ``Wav2Vec2Model`` with the weights of a CTC checkpoint. Where the checkpoint lies and how
its files are read is the caller's affair.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lowvram_models.constants import CONTEXT_S, FPS, SPEECH_RATE_HZ, WHOLE_FILE_S, WINDOW_S

if TYPE_CHECKING:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

FEATURE_RATE_HZ = 50
BUCKET_RATE_HZ = 30

_PREFIX = "wav2vec2."
_POSITION_WEIGHT = "encoder.pos_conv_embed.conv."
_WEIGHT_NORM_NAMES = {
    _POSITION_WEIGHT + "weight_g": _POSITION_WEIGHT + "parametrizations.weight.original0",
    _POSITION_WEIGHT + "weight_v": _POSITION_WEIGHT + "parametrizations.weight.original1",
}


def build_wav2vec2(config: Mapping[str, Any]) -> Wav2Vec2Model:
    """Construct the encoder from a transformers ``config.json``, in eval mode without gradients; also on "meta".

    What only training uses (dropout of layers, masking) is switched off, so that the model has no masking vector.
    Raises ValueError where the config is not one of wav2vec2.
    """
    if config.get("model_type") != "wav2vec2":
        raise ValueError(f"model_type is {config.get('model_type')!r}; expected 'wav2vec2'")
    for_inference = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "apply_spec_augment": False, "layerdrop": 0.0}
    # Four seconds to import: only who builds one pays.
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return Wav2Vec2Model(Wav2Vec2Config.from_dict({**config, **for_inference})).eval().requires_grad_(False)


def wav2vec2_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of ``Wav2Vec2Model`` from a CTC checkpoint's tensors, or from a bare encoder's.

    Drops the prefix ``wav2vec2.``, the heads and the masking vector; takes the old names of weight normalisation
    (``weight_g``, ``weight_v``) and the new ones. Loading it is strict: what is missing is named there.
    """
    prefixed = any(name.startswith(_PREFIX) for name in tensors)
    state = {}
    for name, tensor in tensors.items():
        if prefixed and not name.startswith(_PREFIX):
            continue
        name = name.removeprefix(_PREFIX)
        if name != "masked_spec_embed":
            state[_WEIGHT_NORM_NAMES.get(name, name)] = tensor
    return state


@torch.no_grad()
def extract_features(
    model: Wav2Vec2Model, samples: Tensor | np.ndarray, *, do_normalize: bool = True, whole_s: float = WHOLE_FILE_S
) -> Tensor:
    """All hidden states of a voice at 50 Hz.

    ``samples`` [N] are mono at 16 kHz; ``do_normalize`` (of ``preprocessor_config.json``) makes them zero mean and unit
    variance over the whole file. Returns float32 [layers + 1, dim, N50] on the CPU.

    Up to ``whole_s`` seconds this is the whole file at once, as the reference does it. Longer audio goes in windows
    with ``CONTEXT_S`` of context on both sides, so memory beyond the output does not grow with the length. The frames
    are as many, and each still comes from the same samples, but it attends to its window's up to 40 s only and not to
    the whole file, so the values are near the reference's and not equal to them.

    Raises ValueError when ``samples`` is not one row, holds NaN or infinity, or is shorter than one feature.
    """
    wave = _as_wave(samples, do_normalize=do_normalize)
    stride, kernel = stride_and_kernel(model.config)
    if len(wave) < kernel:
        raise ValueError(f"audio has {len(wave)} samples; expected at least {kernel}")
    if len(wave) <= whole_s * SPEECH_RATE_HZ:
        return hidden_states(model, wave)
    window, context = (seconds * SPEECH_RATE_HZ // stride for seconds in (WINDOW_S, CONTEXT_S))
    return _in_windows(model, wave, window=window, context=context)


def num_clips(num_features: int, infer_frames: int) -> int:
    """How many clips of ``infer_frames`` video frames audio of ``num_features`` frames at 50 Hz asks for."""
    return int(count_buckets(num_features) / (infer_frames * BUCKET_RATE_HZ / FPS)) + 1


def audio_embedding(hidden: Tensor, infer_frames: int) -> Tensor:
    """Audio features of every video frame, zeros after the end of the audio.

    ``hidden`` [layers, dim, N50] -> [1, layers, dim, num_clips * infer_frames]: linear interpolation (ends aligned) to
    ``int(N50 / 50 * 30)`` values at 30 Hz, of which video frame i reads number round(i * 30 / 25).

    Raises ValueError where ``infer_frames`` is below 1 or the audio is too short for one value at 30 Hz.
    """
    layers, dim, num_features = hidden.shape
    num_buckets = count_buckets(num_features)
    if infer_frames < 1 or num_buckets < 1:
        raise ValueError(
            f"got {num_features} audio features and {infer_frames} frames a clip; expected 2 and 1 or more"
        )
    num_frames = num_clips(num_features, infer_frames) * infer_frames
    buckets = torch.from_numpy(np.round(np.arange(num_frames) * BUCKET_RATE_HZ / FPS).astype(np.int64))
    buckets = buckets[buckets < num_buckets].to(hidden.device)
    embedding = hidden.new_zeros(1, layers, dim, num_frames)
    # Layer by layer, so that the features at 30 Hz never stand there as a whole.
    for layer in range(layers):
        at_30_hz = functional.interpolate(hidden[layer, None], size=num_buckets, mode="linear", align_corners=True)
        embedding[0, layer, :, : len(buckets)] = at_30_hz[0][:, buckets]
    return embedding


def count_buckets(num_features: int) -> int:
    """Values at 30 Hz of so many features at 50 Hz."""
    return int(num_features / FEATURE_RATE_HZ * BUCKET_RATE_HZ)


def _as_wave(samples: Tensor | np.ndarray, *, do_normalize: bool) -> Tensor:
    """[N] float32 on the CPU; normalised as transformers' ``Wav2Vec2FeatureExtractor`` does."""
    wave = torch.as_tensor(samples).float().cpu().numpy()
    if wave.ndim != 1:
        raise ValueError(f"audio has shape {list(wave.shape)}; expected one channel [samples]")
    if not np.isfinite(wave).all():
        raise ValueError("audio holds NaN or infinity; expected finite samples")
    if do_normalize and wave.size:
        wave = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
    return torch.from_numpy(wave)


def stride_and_kernel(config: Wav2Vec2Config) -> tuple[int, int]:
    """Samples from one feature to the next, and samples one feature sees: 320 and 400 as published."""
    stride, kernel = 1, 1
    for layer_kernel, layer_stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        kernel += (layer_kernel - 1) * stride
        stride *= layer_stride
    return stride, kernel


def _in_windows(model: Wav2Vec2Model, wave: Tensor, *, window: int, context: int) -> Tensor:
    """Hidden states of [N] samples in windows of at most ``window`` features, with ``context`` more on both sides."""
    stride, kernel = stride_and_kernel(model.config)
    num_features = (len(wave) - kernel) // stride + 1
    hidden = torch.empty(model.config.num_hidden_layers + 1, model.config.hidden_size, num_features)
    for start, end in cut_evenly(num_features, window):
        first, last = max(0, start - context), min(num_features, end + context)
        # Exactly the samples that these features see, so there are last - first of them.
        states = hidden_states(model, wave[first * stride : (last - 1) * stride + kernel])
        hidden[:, :, start:end] = states[:, :, start - first : end - first]
    return hidden


def cut_evenly(num_features: int, longest: int) -> list[tuple[int, int]]:
    """Cut ``num_features`` into pieces of nearly equal length, none above ``longest``: no short last one."""
    count = math.ceil(num_features / longest)
    return list(itertools.pairwise(num_features * index // count for index in range(count + 1)))


def hidden_states(model: Wav2Vec2Model, wave: Tensor) -> Tensor:
    """[layers + 1, dim, frames] float32 on the CPU of one stretch of samples [n]."""
    reference = model.feature_projection.projection.weight
    output = model(wave[None].to(reference.device, reference.dtype), output_hidden_states=True)
    return torch.stack([state[0].T.float().cpu() for state in output.hidden_states])
