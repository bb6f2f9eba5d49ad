"""The voice: as 16 kHz mono samples for the model, and as a stream of frames for the video's sound track."""

import logging
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
import soxr
from av.audio.frame import AudioFrame
from av.container import InputContainer
from numpy.typing import NDArray

from lowvram_kernels.errors import InputError

logger = logging.getLogger(__name__)

SPEECH_RATE_HZ = 16_000
TRACK_RATE_HZ = 48_000
SILENCE_PEAK = 1e-4  # -80 dBFS: below what a microphone in a quiet room records
MAX_BAD_PACKETS = 0.05
_EXPECTED = "expected WAV, MP3, M4A, FLAC or OGG"
# Nothing that can name other files (playlists, concatenations) is opened.
_DEMUXERS = "wav,w64,aiff,mp3,aac,mov,mp4,m4a,3gp,3g2,mj2,flac,ogg,matroska,webm"
_INTEGER_SCALES = {"u8": (128.0, 1 / 128), "s16": (0.0, 1 / 32768), "s32": (0.0, 1 / 2**31)}


def load_speech(path: str | os.PathLike[str]) -> NDArray[np.float32]:
    """Decode a WAV, MP3, M4A, FLAC or OGG of any rate and channel count to 16 kHz mono.

    Channels are averaged, integers scaled by their full range (16 bit: 1/32768), other rates resampled by soxr HQ as a
    stream, so that only the 16 kHz samples of the whole file are held.

    Returns:
        float32 [samples], nominally in [-1, 1], ``ceil(input samples * 16000 / input rate)`` long.

    Raises:
        InputError: missing, not audio, damaged, without an audio stream, empty, silent, or with NaN or infinity.
    """
    buffer = bytearray()  # grows by reallocation, where a list of chunks would need twice the memory at its end
    resampler: _MonoResampler | None = None
    for frame in _decode(Path(path)):
        resampler = resampler or _MonoResampler(Path(path), frame.sample_rate)
        buffer += resampler.push(frame).tobytes()
    if resampler is not None:
        buffer += resampler.finish().tobytes()
    samples: NDArray[np.float32] = np.frombuffer(buffer, dtype=np.float32)
    if samples.size == 0:
        raise InputError(f"audio {path} is empty: expected speech of half a second or more; record it again")
    if max(float(samples.max()), -float(samples.min())) < SILENCE_PEAK:
        raise InputError(
            f"audio {path} is silent: no sample reaches {SILENCE_PEAK:g} of full scale; expected speech, check the file"
        )
    return samples


def check_duration(samples: NDArray[np.float32], min_frames: int, fps: int = 25) -> None:
    """Refuse a voice shorter than ``min_frames`` video frames; ``samples`` is mono at 16 kHz.

    Raises:
        InputError: with both durations.
    """
    if len(samples) * fps < min_frames * SPEECH_RATE_HZ:
        raise InputError(
            f"audio is {len(samples) / SPEECH_RATE_HZ:.4f} s long: expected at least {min_frames / fps:.4f} s "
            f"({min_frames} frames at {fps} a second); use a longer recording"
        )


class AudioTrack:
    """A file's sound, decoded as it is asked for, as 48 kHz planar float frames, mono or stereo.

    More than two channels are mixed down to stereo. A context manager; memory does not grow with the file's length.

    Raises:
        InputError: from the constructor or from ``read``: missing, not audio, without an audio stream, damaged.
    """

    rate_hz = TRACK_RATE_HZ

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._container = _open(Path(path))
        self.layout = "mono" if self._container.streams.audio[0].channels == 1 else "stereo"
        self._frames = _decode(Path(path), self._container)
        self._resampler = av.AudioResampler(format="fltp", layout=self.layout, rate=self.rate_hz)
        self._fifo = av.AudioFifo()
        self._drained = False

    def read(self, samples: int) -> AudioFrame | None:
        """The next ``samples`` samples (1 or more), without timestamps; fewer at the file's end, None after it."""
        if samples < 1:
            raise ValueError(f"expected to read at least one sample, received {samples}")
        while not self._drained and self._fifo.samples < samples:
            frame = next(self._frames, None)
            self._drained = frame is None
            self._push(frame)
        if self._fifo.samples == 0:
            return None
        return self._fifo.read(samples, partial=True)

    def _push(self, frame: AudioFrame | None) -> None:
        if frame is not None:
            frame.pts = None  # files with gaps in their timestamps are played without them
        for resampled in self._resampler.resample(frame):
            resampled.pts = None
            self._fifo.write(resampled)

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._drained = True
        self._frames.close()
        self._container.close()

    def __enter__(self) -> "AudioTrack":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _MonoResampler:
    """Decoded frames of one rate in, 16 kHz mono out."""

    def __init__(self, path: Path, rate_hz: int) -> None:
        self._path, self._rate_hz = path, rate_hz
        self._stream = None
        if rate_hz != SPEECH_RATE_HZ:
            self._stream = soxr.ResampleStream(rate_hz, SPEECH_RATE_HZ, 1, dtype="float32", quality="HQ")
        self._received = self._sent = 0

    def push(self, frame: AudioFrame) -> NDArray[np.float32]:
        if frame.sample_rate != self._rate_hz:
            raise InputError(
                f"audio {self._path} changes its rate from {self._rate_hz} to {frame.sample_rate} Hz: "
                "expected one rate; convert it to a WAV first"
            )
        mono = _to_mono(frame)
        if not np.isfinite(mono).all():
            raise InputError(f"audio {self._path} holds NaN or infinite samples: expected finite ones; export it again")
        self._received += mono.size
        chunk = mono if self._stream is None else self._stream.resample_chunk(mono)
        self._sent += chunk.size
        return chunk

    def finish(self) -> NDArray[np.float32]:
        """What the filter still holds, cut or padded so that the whole is ceil(input * 16000 / rate) samples."""
        if self._stream is None:
            return np.empty(0, np.float32)
        tail = self._stream.resample_chunk(np.empty(0, np.float32), last=True)
        missing = -(-self._received * SPEECH_RATE_HZ // self._rate_hz) - self._sent
        return np.pad(tail[: max(missing, 0)], (0, max(missing - tail.size, 0)))


def _to_mono(frame: AudioFrame) -> NDArray[np.float32]:
    samples: NDArray[Any] = frame.to_ndarray()
    channels = frame.layout.nb_channels
    if not frame.format.is_planar:
        samples = samples.reshape(-1, channels).T
    kind = frame.format.name.removesuffix("p")
    if kind in _INTEGER_SCALES:
        offset, scale = _INTEGER_SCALES[kind]
        samples = ((samples.astype(np.float64) - offset) * scale).astype(np.float32)
    samples = samples.astype(np.float32, copy=False)
    return np.ascontiguousarray(samples[0] if channels == 1 else samples.mean(axis=0))


def _open(path: Path) -> InputContainer:
    if not path.is_file():
        raise InputError(f"audio {path} is not a file: {_EXPECTED}; check the path")
    try:
        container = av.open(
            f"file:{path.absolute()}", options={"format_whitelist": _DEMUXERS}, metadata_errors="replace"
        )
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"audio {path} cannot be read ({_reason(error)}): {_EXPECTED}; convert it first") from error
    if not container.streams.audio:
        container.close()
        raise InputError(f"audio {path} has no audio stream: {_EXPECTED}; choose a file with sound")
    return container


def _decode(path: Path, container: InputContainer | None = None) -> Generator[AudioFrame, None, None]:
    """Frames of the first audio stream, in order; a few undecodable packets are skipped with one warning."""
    packets = bad_packets = 0
    with container or _open(path) as source:
        for packet in _demux(path, source):
            packets += 1
            try:
                yield from packet.decode()
            except (av.FFmpegError, OSError) as error:
                bad_packets += 1
                logger.debug("%s: packet %d does not decode (%s)", path, packets, _reason(error))
    # One is allowed even in a short file: the packet at which a copy was cut.
    if bad_packets > max(1, MAX_BAD_PACKETS * packets):
        raise InputError(
            f"audio {path} is damaged: {bad_packets} of {packets} packets do not decode; {_EXPECTED}, convert it again"
        )
    if bad_packets:
        logger.warning("audio %s: %d of %d packets do not decode and were skipped", path, bad_packets, packets)


def _demux(path: Path, container: InputContainer) -> Iterator[Any]:
    try:
        yield from container.demux(container.streams.audio[0])
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"audio {path} breaks off ({_reason(error)}): expected a whole file; copy it again") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
