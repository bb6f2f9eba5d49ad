"""A voice that is too long to be encoded at once: features of its video frames, window by window as they are needed.

The windows, and the samples that each of them sees, are those of ``extract_features`` in ``audio_encoder.py``; what
comes out is what ``audio_embedding`` makes of its result, without the whole of either ever standing there.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowvram_models.audio_encoder import (
    BUCKET_RATE_HZ,
    count_buckets,
    cut_evenly,
    hidden_states,
    stride_and_kernel,
)
from lowvram_models.constants import CONTEXT_S, FPS, SPEECH_RATE_HZ, WHOLE_FILE_S, WINDOW_S

if TYPE_CHECKING:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

_PIECE = 1 << 20  # samples that are looked at together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windowing:
    """Seconds: a voice above ``whole_s`` is encoded in windows of at most ``window_s``, each with ``context_s`` more on
    both sides."""

    whole_s: float = WHOLE_FILE_S
    window_s: float = WINDOW_S
    context_s: float = CONTEXT_S

    def is_long(self, num_samples: int) -> bool:
        return num_samples > self.whole_s * SPEECH_RATE_HZ


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """Features [start, end) at 50 Hz, and the video frames [first, last) that are made when they are there."""

    start: int
    end: int
    first: int
    last: int


class LongVoice:
    """Samples [N], mono at 16 kHz, and the windows that ``num_frames`` video frames of them need.

    ``goes_on`` says that the samples are the beginning of a longer voice, and those behind the frames are context only.
    Zero mean and unit variance are those of all samples.

    Raises:
        ValueError: the samples are not one row, hold NaN or infinity, or are too few.
    """

    def __init__(
        self,
        config: Wav2Vec2Config,
        samples: NDArray[np.float32],
        num_frames: int,
        *,
        do_normalize: bool,
        windowing: Windowing,
        goes_on: bool = False,
    ):
        self._stride, self._kernel = stride_and_kernel(config)
        if samples.ndim != 1 or len(samples) < self._kernel + self._stride:
            raise ValueError(f"audio has shape {list(samples.shape)}; expected one channel of more than two features")
        mean, deviation = _mean_and_deviation(samples)
        self._samples, self._mean, self._deviation = samples, np.float32(mean), np.float32(deviation)
        if not do_normalize:
            self._mean, self._deviation = np.float32(0), np.float32(1)
        self.num_frames = num_frames
        self.num_features = count_features(config, len(samples))
        self._lower, self._upper, self._weight = frame_positions(num_frames, self.num_features)
        self._context = int(windowing.context_s * SPEECH_RATE_HZ) // self._stride
        used = int(self._upper[-1]) + 1 if goes_on else self.num_features
        self.windows = self._cut(used, int(windowing.window_s * SPEECH_RATE_HZ) // self._stride)

    def _cut(self, used: int, longest: int) -> list[Window]:
        """Whichever frame needs a feature of two windows is made with the later one."""
        cuts = cut_evenly(used, longest)
        lasts = [int(np.searchsorted(self._upper, end)) for _, end in cuts]
        needed = next((index for index, last in enumerate(lasts) if last >= len(self._upper)), len(lasts) - 1) + 1
        lasts[needed - 1] = self.num_frames  # zeros behind the end of the voice
        firsts = [0, *lasts]
        return [
            Window(start=start, end=end, first=firsts[index], last=lasts[index])
            for index, (start, end) in enumerate(cuts[:needed])
        ]

    @torch.inference_mode()
    def encode(self, model: Wav2Vec2Model, window: Window, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features of the window's video frames [1, layers + 1, dim, last - first], float32 on the CPU, and its last
        feature [layers + 1, dim, 1], which is ``before`` for the next window."""
        first, last = max(0, window.start - self._context), min(self.num_features, window.end + self._context)
        wave = self._samples[first * self._stride : (last - 1) * self._stride + self._kernel]
        normal = torch.from_numpy((wave - self._mean) / self._deviation)
        states = hidden_states(model, normal)[:, :, window.start - first : window.end - first]
        start, after = window.start, states[:, :, -1:].clone()
        if before is not None:
            start, states = start - before.shape[2], torch.cat([before, states], dim=2)
        return self._at_frames(states, start, window), after

    def _at_frames(self, states: Tensor, start: int, window: Window) -> Tensor:
        layers, dim, _ = states.shape
        frames = slice(window.first, min(window.last, len(self._upper)))
        lower, upper = (torch.from_numpy(index[frames] - start) for index in (self._lower, self._upper))
        weight = torch.from_numpy(self._weight[frames])
        found = states.new_zeros(1, layers, dim, window.last - window.first)
        for layer, at_50_hz in enumerate(states):
            found[0, layer, :, : len(weight)] = at_50_hz[:, lower] * (1 - weight) + at_50_hz[:, upper] * weight
        return found


def count_features(config: Wav2Vec2Config, num_samples: int) -> int:
    """Features at 50 Hz of so many samples."""
    stride, kernel = stride_and_kernel(config)
    return (num_samples - kernel) // stride + 1


def frame_positions(
    num_frames: int, num_features: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Of each of ``num_frames`` video frames that begins within a voice of ``num_features``: the two features that it
    lies between and the weight of the second one, as ``torch.nn.functional.interpolate`` rounds them (linear, ends
    aligned, in float32)."""
    num_buckets = count_buckets(num_features)
    buckets = np.round(np.arange(num_frames) * BUCKET_RATE_HZ / FPS).astype(np.int64)
    buckets = buckets[buckets < num_buckets]
    scale = np.float32(num_features - 1) / np.float32(num_buckets - 1) if num_buckets > 1 else np.float32(0)
    position = scale * buckets.astype(np.float32)
    lower = np.minimum(position.astype(np.int64), num_features - 1)
    weight = np.clip(position - lower.astype(np.float32), np.float32(0), np.float32(1))
    return lower, np.minimum(lower + 1, num_features - 1), weight


def _mean_and_deviation(samples: NDArray[np.float32]) -> tuple[float, float]:
    """Of all samples, as ``Wav2Vec2FeatureExtractor`` has it, added up piece by piece in float64.

    Raises:
        ValueError: NaN or infinity.
    """
    pieces = [samples[start : start + _PIECE] for start in range(0, len(samples), _PIECE)]
    mean = sum(float(piece.sum(dtype=np.float64)) for piece in pieces) / len(samples)
    if not np.isfinite(mean):
        raise ValueError("audio holds NaN or infinity; expected finite samples")
    squares = sum(float(np.square(piece - np.float64(mean)).sum()) for piece in pieces)
    return mean, float(np.sqrt(squares / len(samples) + 1e-7))
