"""Sounds in whatever container and codec FFmpeg writes, some of them damaged."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from lowvram.media.voice import load_voice

LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 6: "5.1"}


def load_speech(path: Path) -> np.ndarray:
    """The voice of a file as the model hears it: 16 kHz mono, float32 [samples]."""
    return load_voice(path).samples


def write_sound(
    path: Path, tracks: list[np.ndarray] | np.ndarray, rate: int, codec: str, form: str, options: dict | None = None
) -> Path:
    """Tracks of float32 [samples] or [channels, samples], each a stream of its own."""
    tracks = tracks if isinstance(tracks, list) else [tracks]
    with av.open(str(path), "w", format=form, options=options or {}) as container:
        streams = []
        for track in tracks:
            planes = np.ascontiguousarray(np.atleast_2d(track), np.float32)
            layout = LAYOUTS[len(planes)]
            streams.append((container.add_stream(codec, rate=rate, layout=layout), planes, layout))
        for stream, planes, layout in streams:
            frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


def bursts(seconds: float, rate: int) -> np.ndarray:
    """Noise below 3 kHz that comes and goes, float32 [samples]: it fits itself at one place only."""
    count = round(seconds * rate)
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(count))
    spectrum[np.fft.rfftfreq(count, 1 / rate) > 3000] = 0
    noise = np.fft.irfft(spectrum, count) * (np.sin(2 * np.pi * 3.3 * np.arange(count) / rate) > 0)
    return (0.4 * noise / np.abs(noise).max()).astype(np.float32)


def lag(samples: np.ndarray, reference: np.ndarray) -> int:
    """By how many samples the first is behind the second."""
    size = 2 * max(len(samples), len(reference))
    product = np.fft.rfft(samples, size) * np.conj(np.fft.rfft(reference, size))
    found = int(np.argmax(np.fft.irfft(product, size)))
    return found - size if found > size // 2 else found
