"""Sounds and pictures that the media tests encode for themselves."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

CODECS = {".wav": "pcm_s16le", ".mp3": "libmp3lame", ".m4a": "aac", ".flac": "flac", ".ogg": "flac", ".opus": "libopus"}

EncodeSound = Callable[[Path, np.ndarray, int], Path]


@pytest.fixture
def tone() -> Callable[..., np.ndarray]:
    """A sine of amplitude 0.5, float32 [samples]."""

    def make(seconds: float, rate: int, hz: float = 440.0) -> np.ndarray:
        return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)

    return make


@pytest.fixture
def encode_sound() -> EncodeSound:
    """Encode float32 [samples] or [channels, samples] in the container that the path's suffix names."""

    def encode(path: Path, samples: np.ndarray, rate: int) -> Path:
        planes = np.atleast_2d(samples).astype(np.float32)
        layout = "mono" if len(planes) == 1 else "stereo"
        with av.open(str(path), "w", format="ogg" if path.suffix == ".opus" else None) as container:
            stream = container.add_stream(CODECS[path.suffix], rate=rate, layout=layout)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(planes), format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return encode


@pytest.fixture
def moving_frames() -> Callable[..., np.ndarray]:
    """A colour pattern that shifts by 4 px a frame, uint8 [frames, height, width, 3]."""

    def make(count: int, height: int = 64, width: int = 96) -> np.ndarray:
        frame = np.zeros((height, width, 3), np.uint8)
        frame[: height // 2] = (220, 20, 30)
        frame[height // 2 :, : width // 2] = (20, 200, 40)
        frame[height // 2 :, width // 2 :] = (30, 40, 230)
        return np.stack([np.roll(frame, 4 * index, axis=1) for index in range(count)])

    return make
