"""The sound of a file as it comes out of its decoder: one track, from where it begins, in float32 at its own rate."""

import dataclasses
import functools
import logging
import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray

from lowvram.media.containers import WITH_SOUND, open_media, reason
from lowvram_kernels.errors import InputError

logger = logging.getLogger(__name__)

EXPECTED = "expected WAV, MP3, M4A, FLAC or OGG, or another recording or video with sound"
MAX_BAD_PACKETS = 0.05
_INTEGER_SCALES = {"u8": (128.0, 1 / 128), "s16": (0.0, 1 / 32768), "s32": (0.0, 1 / 2**31), "s64": (0.0, 1 / 2**63)}
_FLOATS = ("flt", "dbl")
_OTHERS = 0.7071  # of a channel that is not in front, left or right
# Of more planes PyAV reads beyond the end of their list (seen with 18.1), and crashes.
_MOST_PLANES = 7
# Samples of silence that encoder and decoder put in front, at the stream's own rate; measured with the encoders that
# FFmpeg has (LAME for MP3). AAC: as many as its first frame has, which is the least that any encoder puts there.
_DELAYS = {"mp3": 1105, "mp3float": 1105, "mp2": 481, "mp2float": 481, "ac3": 256, "eac3": 256, "opus": 312}
_DELAYS |= {"g722": 22, "amrnb": 40, "real_144": 160, "libopencore_amrnb": 40}
_AAC = ("aac", "aac_latm", "aac_fixed")
# These say themselves what is to be left out at the start (edit lists, codec delay, pre-skip), and FFmpeg does so.
_SAY_THEIR_DELAY = frozenset(("mov", "matroska", "webm", "ogg", "caf", "iamf"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sound:
    """Which part of a file is meant: of its sound tracks number ``track``, from 0 on; of that all channels, or number
    ``channel`` alone; every sample times ``gain``; from ``start_s`` on, for ``duration_s`` or to the end."""

    path: Path
    track: int = 0
    channel: int | None = None
    gain: float = 1.0
    start_s: float = 0.0
    duration_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Samples [channels, n], float32, at ``rate_hz``, of channels that ``layout`` names, none above ``peak``;
    ``scalable`` says that they came as floats, which may lie beyond full scale."""

    samples_CN: NDArray[np.float32]
    rate_hz: int
    layout: str
    scalable: bool
    peak: float = math.inf

    def heard(self) -> NDArray[np.float32]:
        """One channel or two as they are, more as two: [1 or 2, n]."""
        return self.samples_CN if len(self.samples_CN) <= 2 else _stereo_weights(self.layout) @ self.samples_CN


def open_sound(path: Path) -> InputContainer:
    """Open a file that has sound.

    Raises:
        InputError: missing, of no format that is read, or without a sound track.
    """
    container = open_media(path, WITH_SOUND, "audio", EXPECTED)
    if not container.streams.audio:
        container.close()
        raise InputError(f"audio {path} has no audio stream: {EXPECTED}; choose a file with sound")
    return container


class Decoding:
    """One pass over a ``Sound``. ``chunks`` gives it piece by piece; then the fields say what was met. What is wrong
    with a file is said once, and not ``again``.

    Every chunk has the channels of the first one, whatever a stream changes to on its way; the encoder's delay is
    left out. Memory does not grow with the length.

    Raises:
        InputError: from the constructor or ``chunks``: the file is missing, no sound, damaged, changes its rate; there
            is no such track or channel.
    """

    def __init__(self, sound: Sound, *, again: bool = False) -> None:
        self.sound, self._again = sound, again
        self.container = open_sound(sound.path)
        try:
            self.stream = _track(sound, self.container)
        except BaseException:
            self.container.close()
            raise
        self.delay = 0  # samples of the encoder that were left out
        self.decoded = 0  # samples behind it, also before start_s
        self.rate_hz = 0
        self.complete = False  # whether it was decoded to the end

    def chunks(self) -> Generator[Chunk, None, None]:
        sound, level = self.sound, logging.DEBUG if self._again else logging.WARNING
        frames = _frames(sound.path, self.container, self.stream, level)
        first: Chunk | None = None
        skip = stop = 0
        for frame, first_pts in frames:
            chunk = _chunk(sound.path, frame)
            if first is None:
                first, self.rate_hz = chunk, chunk.rate_hz
                skip = self.delay = _delay(self.container, self.stream, frame, first_pts)
                begin = round(sound.start_s * chunk.rate_hz)
                stop = -1 if sound.duration_s is None else begin + max(1, round(sound.duration_s * chunk.rate_hz))
            _check_rate(sound.path, chunk, self.rate_hz)
            samples = _like(chunk.samples_CN, len(first.samples_CN))[:, skip:]
            skip = max(0, skip - frame.samples)
            before, self.decoded = self.decoded, self.decoded + samples.shape[1]
            samples = samples[:, max(0, begin - before) : None if stop < 0 else max(0, stop - before)]
            if samples.shape[1]:
                yield self._chosen(samples, first.layout, chunk.scalable)
            if 0 <= stop <= self.decoded:
                frames.close()
                return
        self.complete = True

    def _chosen(self, samples: NDArray[np.float32], layout: str, scalable: bool) -> Chunk:
        """The channel that is meant, finite and times the gain."""
        sound = self.sound
        if sound.channel is not None:
            samples, layout = samples[sound.channel : sound.channel + 1], "mono"
        if sound.gain != 1:
            samples = samples * np.float32(sound.gain)
        peak = max(float(samples.max()), -float(samples.min()))
        if not math.isfinite(peak):
            raise InputError(f"audio {sound.path} holds NaN or infinite samples: expected finite ones; export it again")
        return Chunk(samples, self.rate_hz, layout, scalable, peak)

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self.container.close()


def _track(sound: Sound, container: InputContainer) -> AudioStream:
    tracks = container.streams.audio
    if not 0 <= sound.track < len(tracks):
        raise InputError(
            f"--audio-track is {sound.track + 1}, and audio {sound.path} has {len(tracks)} sound "
            f"track{'s' if len(tracks) > 1 else ''}; expected 1 to {len(tracks)}"
        )
    stream = tracks[sound.track]
    if stream.codec_context is None:
        raise InputError(
            f"audio {sound.path} cannot be decoded: there is no decoder for its track {sound.track + 1}; {EXPECTED}, "
            "convert it first"
        )
    return stream


def _frames(
    path: Path, container: InputContainer, stream: AudioStream, level: int
) -> Generator[tuple[AudioFrame, int | None], None, None]:
    """Frames in order, each with the time of the file's first packet; a few undecodable packets are skipped with one
    warning."""
    packets = bad_packets = 0
    first_pts: int | None = None
    for packet in _demux(path, container, stream):
        packets += 1
        first_pts = packet.pts if packets == 1 else first_pts
        try:
            for frame in packet.decode():
                yield frame, first_pts
        except (av.FFmpegError, OSError) as error:
            bad_packets += 1
            logger.debug("%s: packet %d does not decode (%s)", path, packets, reason(error))
    # One is allowed even in a short file: the packet at which a copy was cut.
    if bad_packets > max(1, MAX_BAD_PACKETS * packets):
        raise InputError(
            f"audio {path} is damaged: {bad_packets} of {packets} packets do not decode; {EXPECTED}, convert it again"
        )
    if bad_packets:
        logger.log(level, "audio %s: %d of %d packets do not decode and were skipped", path, bad_packets, packets)


def _demux(path: Path, container: InputContainer, stream: AudioStream) -> Iterator[Any]:
    try:
        yield from container.demux(stream)
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"audio {path} breaks off ({reason(error)}): expected a whole file; copy it again") from error


def _chunk(path: Path, frame: AudioFrame) -> Chunk:
    if frame.format.is_planar and frame.layout.nb_channels > _MOST_PLANES:
        frame = _packed(frame)
    kind, channels = frame.format.name.removesuffix("p"), frame.layout.nb_channels
    try:
        samples: NDArray[Any] = frame.to_ndarray()
    except ValueError as error:
        raise InputError(f"audio {path} holds samples of the kind {kind!r}: {EXPECTED}; convert it first") from error
    if not frame.format.is_planar:
        samples = np.ascontiguousarray(samples.reshape(-1, channels).T)
    if kind in _INTEGER_SCALES:
        offset, scale = _INTEGER_SCALES[kind]
        # float32 holds what has up to 24 bits.
        wide: NDArray[Any] = samples.astype(np.float32 if samples.itemsize <= 2 else np.float64)
        samples = (wide - offset) * scale
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, and is told as such
        samples = samples.astype(np.float32, copy=False)
    return Chunk(samples, frame.sample_rate, frame.layout.name, kind in _FLOATS)


def _packed(frame: AudioFrame) -> AudioFrame:
    """The same samples in one plane."""
    resampler = av.AudioResampler(frame.format.packed, frame.layout, frame.sample_rate)
    return resampler.resample(frame)[0]


@functools.cache
def _stereo_weights(layout: str) -> NDArray[np.float32]:
    """[2, channels]: what of each channel is heard left and right, which is what FFmpeg takes; all alike where the file
    does not say which channel is which, as of a recorder with many microphones."""
    names = [channel.name for channel in av.AudioLayout(layout).channels]
    if "FL" not in names or "FR" not in names:
        return np.full((2, len(names)), 1 / len(names), np.float32)
    return np.array([[_heard(name, side) for name in names] for side in "LR"], np.float32)


def _heard(channel: str, side: str) -> float:
    """``channel`` is FFmpeg's name, as FL, BR, TFC or LFE; a centre is heard by both sides."""
    if channel == f"F{side}":
        return 1.0
    return 0.0 if channel.startswith("LFE") or channel[-1] in {"L": "R", "R": "L"}[side] else _OTHERS


def _check_rate(path: Path, chunk: Chunk, rate_hz: int) -> None:
    if chunk.rate_hz != rate_hz:
        raise InputError(
            f"audio {path} changes its rate from {rate_hz} to {chunk.rate_hz} Hz: expected one rate; convert it to a "
            "WAV first"
        )


def _like(samples_CN: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    """As many channels as the stream began with."""
    if len(samples_CN) == channels:
        return samples_CN
    return np.repeat(samples_CN.mean(axis=0, dtype=np.float32, keepdims=True), channels, axis=0)


def _delay(container: InputContainer, stream: AudioStream, first: AudioFrame, first_pts: int | None) -> int:
    """Samples at the start that the encoder put there and the file does not name."""
    formats, codec = container.format.name.split(","), stream.codec_context.name
    told = first_pts is not None and first_pts < 0
    if "mp3" in formats and stream.start_time:  # of LAME's tag, which FFmpeg follows
        told = True
    if told or not _SAY_THEIR_DELAY.isdisjoint(formats):
        return 0
    return first.samples if codec in _AAC else _DELAYS.get(codec, 0)
