"""The voice as a stream of frames for the video's sound track, and what is too short to be one."""

import os
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.audio.frame import AudioFrame
from numpy.typing import NDArray

from lowvram.media.sound import Chunk, Decoding, Sound
from lowvram_kernels.errors import InputError
from lowvram_models.constants import FPS, SPEECH_RATE_HZ

TRACK_RATE_HZ = 48_000


def check_duration(samples: NDArray[np.float32], min_frames: int, fps: int = FPS) -> None:
    """Refuse a voice shorter than ``min_frames`` video frames; ``samples`` is mono at 16 kHz.

    Raises:
        InputError: with both durations.
    """
    if len(samples) * fps < min_frames * SPEECH_RATE_HZ:
        raise InputError(
            f"audio is {len(samples) / SPEECH_RATE_HZ:.4f} s long: expected at least {min_frames / fps:.4f} s "
            f"({min_frames} frames at {fps} a second); use a longer recording, or more of it"
        )


class AudioTrack:
    """A file's sound, decoded as it is asked for, as 48 kHz planar float frames, mono or stereo.

    More than two channels are mixed down to stereo. Of a path it is all of its first track as it is; of a ``Sound`` the
    part that is meant. A context manager; memory does not grow with the file's length.

    Raises:
        InputError: from the constructor or from ``read``: missing, not audio, without an audio stream, damaged.
    """

    rate_hz = TRACK_RATE_HZ

    def __init__(self, sound: str | os.PathLike[str] | Sound) -> None:
        chosen = isinstance(sound, Sound)  # by reading it before
        self._decoding = Decoding(sound if isinstance(sound, Sound) else Sound(path=Path(sound)), again=chosen)
        self._chunks = self._decoding.chunks()
        try:
            self._next = next(self._chunks, None)
        except BaseException:
            self._decoding.close()
            raise
        # As it is decoded: what a file says of its channels may be less (AAC's parametric stereo).
        self.layout = "mono" if self._next is None or len(self._next.samples_CN) == 1 else "stereo"
        self._resampler = av.AudioResampler(format="fltp", layout=self.layout, rate=self.rate_hz)
        self._fifo = av.AudioFifo()
        self._drained = False

    def read(self, samples: int) -> AudioFrame | None:
        """The next ``samples`` samples (1 or more), without timestamps; fewer at the file's end, None after it."""
        if samples < 1:
            raise ValueError(f"expected to read at least one sample, received {samples}")
        while not self._drained and self._fifo.samples < samples:
            chunk, self._next = self._next, None
            chunk = chunk or next(self._chunks, None)
            self._drained = chunk is None
            self._push(chunk)
        if self._fifo.samples == 0:
            return None
        return self._fifo.read(samples, partial=True)

    def _push(self, chunk: Chunk | None) -> None:
        for resampled in self._resampler.resample(None if chunk is None else _frame(chunk)):
            resampled.pts = None
            self._fifo.write(resampled)

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._drained = True
        self._chunks.close()
        self._decoding.close()

    def __enter__(self) -> "AudioTrack":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _frame(chunk: Chunk) -> AudioFrame:
    planes = np.ascontiguousarray(chunk.heard())
    frame = AudioFrame.from_ndarray(planes, format="fltp", layout="mono" if len(planes) == 1 else "stereo")
    frame.sample_rate = chunk.rate_hz
    return frame
