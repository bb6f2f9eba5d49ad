"""The voice of a file: which track and channel it is in, at which level, and its samples for the model."""

import dataclasses
import logging
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from lowvram.media.sound import Chunk, Decoding, Sound, open_sound
from lowvram.media.stated import stated_seconds
from lowvram_kernels.errors import InputError
from lowvram_models.constants import SPEECH_RATE_HZ

logger = logging.getLogger(__name__)

SILENCE_PEAK = 1e-4  # -80 dBFS: below what a microphone in a quiet room records
# Channels that have nothing to do with each other mix to 1.0 of this measure, equal ones to more; -12 dB is left of
# two where one is the other turned around and 0.7 as loud.
_CANCELLED = 0.25
_FLOAT32_SQUARES = 1e9  # samples up to here can be squared and added up in float32
_CUT_S, _CUT_SHARE = 0.1, 0.001
# Full scales of the integers that a float file may hold by mistake.
_INTEGER_SCALES = (2.0**15, 2.0**23, 2.0**31)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voice:
    """``samples``, float32 [n] mono at 16 kHz, and where they come from; ``goes_on``: there are more of them behind
    those that were read. ``facts`` are for a report."""

    sound: Sound
    samples: NDArray[np.float32]
    facts: dict[str, Any]
    goes_on: bool = False


@dataclasses.dataclass
class Levels:
    """What was met on the way through a sound: its ``count`` of samples, each channel's energy and highest sample, the
    energy of what channels give when they are averaged, whether floats are all whole numbers, and whether the sound
    ``goes_on`` behind what was read."""

    count: int = 0
    energies: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.zeros(1))
    mixed_energy: float = 0.0
    peak: float = 0.0
    whole: bool = True
    goes_on: bool = False

    def add(self, chunk: Chunk, mono: NDArray[np.float32]) -> None:
        samples = chunk.samples_CN
        self.count += samples.shape[1]
        self.energies = self.energies + np.array([_energy(channel, chunk.peak) for channel in samples])
        self.mixed_energy += _energy(mono, chunk.peak)
        self.peak = max(self.peak, chunk.peak)
        if len(samples) > 2:  # of which the sound track has two, which may be louder
            self.peak = max(self.peak, float(np.abs(chunk.heard()).max()))
        self.whole = self.whole and chunk.scalable and bool((samples == np.rint(samples)).all())

    @property
    def cancelled(self) -> bool:
        """Whether the channels, averaged, lose what is in them."""
        channels = len(self.energies)
        apart = float(self.energies.sum()) / channels**2
        return channels > 1 and self.mixed_energy < _CANCELLED**2 * apart

    @property
    def gain(self) -> float:
        """What brings the highest sample to full scale, or whole numbers to what they were; 1 within full scale."""
        if self.peak <= 1:
            return 1.0
        scales = [scale for scale in _INTEGER_SCALES if self.peak <= scale]
        return 1 / scales[0] if self.whole and scales else 1 / self.peak

    @property
    def silent(self) -> bool:
        return self.peak * self.gain < SILENCE_PEAK


def _energy(samples: NDArray[np.float32], peak: float) -> float:
    exact = samples if peak < _FLOAT32_SQUARES else samples.astype(np.float64)
    return float(np.dot(exact, exact))


@dataclasses.dataclass(frozen=True)
class _Reading:
    """One track, read: its mono samples at 16 kHz before any gain."""

    sound: Sound
    samples: NDArray[np.float32]
    levels: Levels
    facts: dict[str, Any]
    goes_on: bool


def load_voice(
    path: Path,
    *,
    track: int | None = None,
    start_s: float = 0.0,
    duration_s: float | None = None,
    limit_s: float | None = None,
) -> Voice:
    """Find and decode the voice of a file, as 16 kHz mono.

    The first sound track that is not silent is taken, or number ``track``, counted from 1. Channels are averaged; where
    that would cancel them the loudest one is taken. Integers are scaled by their full range (16 bit: 1/32768), floats
    beyond full scale down to it. Other rates are resampled by soxr HQ as a stream, so that only the 16 kHz samples are
    held. What was done to the sound beyond that is said in the log. Behind ``limit_s`` nothing is read, and the sound
    is none the shorter for it: level, channels and silence are those of what is read.

    Returns:
        The samples are nominally in [-1, 1], ``ceil(input samples * 16000 / input rate)`` of them.

    Raises:
        InputError: missing, no sound, damaged, no such track, empty, silent, with NaN or infinity, or it ends before
            ``start_s``.
    """
    reading = _first_voice(path, track, start_s, duration_s, limit_s)
    if reading.levels.cancelled:
        loudest = int(np.argmax(reading.levels.energies))
        logger.warning(
            "audio %s: its %d channels cancel each other, as where one is turned around; channel %d alone is used",
            path,
            len(reading.levels.energies),
            loudest + 1,
        )
        reading = _read(dataclasses.replace(reading.sound, channel=loudest), limit_s, again=True)
    gain = reading.levels.gain
    if gain != 1:
        _tell_gain(path, reading.levels)
        np.multiply(reading.samples, np.float32(gain), out=reading.samples)
    sound = dataclasses.replace(reading.sound, gain=gain)
    chosen = {"track": sound.track + 1, "channel": None if sound.channel is None else sound.channel + 1, "gain": gain}
    return Voice(sound=sound, samples=reading.samples, facts=chosen | reading.facts, goes_on=reading.goes_on)


def _first_voice(
    path: Path, track: int | None, start_s: float, duration_s: float | None, limit_s: float | None
) -> _Reading:
    with open_sound(path) as container:
        tracks = len(container.streams.audio)
    failed: list[InputError] = []
    goes_on = False
    for index in range(tracks) if track is None else (track - 1,):
        try:
            reading = _read(Sound(path=path, track=index, start_s=start_s, duration_s=duration_s), limit_s)
        except InputError as error:
            failed.append(error)
            continue
        if not reading.levels.silent:
            _tell_track(path, index, tracks, track, failed)
            return reading
        goes_on = goes_on or reading.goes_on
    if failed:
        raise failed[0]
    which = "" if tracks == 1 else f", all {tracks} tracks," if track is None else f", track {track} of {tracks},"
    where = f" behind {start_s:g} s" if start_s else ""
    where += f" for {limit_s:g} s, and no more of it is asked for" if goes_on else ""
    raise InputError(
        f"audio {path}{which} is silent{where}: no sample reaches {SILENCE_PEAK:g} of full scale; expected speech, "
        "check the file"
    )


def _read(sound: Sound, limit_s: float | None = None, *, again: bool = False) -> _Reading:
    decoding, levels = Decoding(sound, again=again), Levels()
    try:
        buffer = bytearray()  # grows by reallocation, where a list of chunks would need twice the memory at its end
        for samples in _resampled(decoding, levels, limit_s):
            buffer += samples.tobytes()
        _check_length(decoding, levels)
        if not again:
            _tell_cut(decoding)
        samples = np.frombuffer(buffer, dtype=np.float32)
        return _Reading(sound, samples, levels, _facts(decoding, levels), levels.goes_on)
    finally:
        decoding.close()


def _resampled(decoding: Decoding, levels: Levels, limit_s: float | None) -> Iterator[NDArray[np.float32]]:
    """16 kHz mono, piece by piece; ceil(input * 16000 / rate) samples in all, of the first ``limit_s``."""
    stream: soxr.ResampleStream | None = None
    sent = 0
    for chunk in _up_to(decoding.chunks(), levels, limit_s):
        if stream is None and chunk.rate_hz != SPEECH_RATE_HZ:
            stream = soxr.ResampleStream(chunk.rate_hz, SPEECH_RATE_HZ, 1, dtype="float32", quality="HQ")
        samples = chunk.samples_CN
        mono = np.ascontiguousarray(samples[0] if len(samples) == 1 else samples.mean(axis=0, dtype=np.float32))
        levels.add(chunk, mono)
        piece = mono if stream is None else stream.resample_chunk(mono)
        sent += piece.size
        yield piece
    if stream is not None:
        tail = stream.resample_chunk(np.empty(0, np.float32), last=True)
        missing = -(-levels.count * SPEECH_RATE_HZ // decoding.rate_hz) - sent
        yield np.pad(tail[: max(missing, 0)], (0, max(missing - tail.size, 0)))


def _up_to(chunks: Generator[Chunk, None, None], levels: Levels, limit_s: float | None) -> Iterator[Chunk]:
    """Chunks until ``levels`` have seen ``limit_s`` of them; notes there whether there are more."""
    for chunk in chunks:
        room = chunk.samples_CN.shape[1] if limit_s is None else round(limit_s * chunk.rate_hz) - levels.count
        if room >= chunk.samples_CN.shape[1]:
            yield chunk
            continue
        levels.goes_on = True
        if room:
            yield dataclasses.replace(chunk, samples_CN=chunk.samples_CN[:, :room])
        chunks.close()
        return


def _check_length(decoding: Decoding, levels: Levels) -> None:
    sound = decoding.sound
    if levels.count:
        return
    if decoding.decoded:
        raise InputError(
            f"audio {sound.path} is {decoding.decoded / decoding.rate_hz:.3f} s long: --audio-start is "
            f"{sound.start_s:g} s; expected less than its length"
        )
    stated = stated_seconds(sound.path, decoding.container, decoding.stream, 0.0)
    more = f", though its header says {stated:.2f} s" if stated else ""
    raise InputError(
        f"audio {sound.path} is empty{more}: expected speech of half a second or more; record or copy it again"
    )


def _tell_cut(decoding: Decoding) -> None:
    """Say where there is less than the header states, or than was asked for."""
    sound = decoding.sound
    if not decoding.complete:
        return
    there = decoding.decoded / decoding.rate_hz
    stated = stated_seconds(sound.path, decoding.container, decoding.stream, there)
    if stated is not None and there < stated - _CUT_S - _CUT_SHARE * stated:
        logger.warning(
            "audio %s ends after %.2f s, its header says %.2f s: the file was cut, as by a copy that broke off; what "
            "is there is used",
            sound.path,
            there,
            stated,
        )
    if sound.duration_s is not None and there < sound.start_s + sound.duration_s - _CUT_S:
        logger.warning(
            "audio %s is %.2f s long: %.2f s are left behind --audio-start, less than --audio-duration %.2f s",
            sound.path,
            there,
            there - sound.start_s,
            sound.duration_s,
        )


def _tell_track(path: Path, index: int, tracks: int, asked: int | None, failed: list[InputError]) -> None:
    for error in failed:
        logger.warning("%s; another track is looked for", error)
    if asked is None and index > 0:
        logger.warning(
            "audio %s has %d sound tracks: track %d is the first that is not silent, and is used; --audio-track N "
            "takes another",
            path,
            tracks,
            index + 1,
        )


def _tell_gain(path: Path, levels: Levels) -> None:
    integers = levels.whole and 1 / levels.gain in _INTEGER_SCALES
    logger.warning(
        "audio %s goes up to %.6g times full scale%s: it is scaled by %.6g",
        path,
        levels.peak,
        ", in whole numbers, which are read as the integers they are" if integers else "",
        levels.gain,
    )


def _facts(decoding: Decoding, levels: Levels) -> dict[str, Any]:
    stream = decoding.stream
    return {
        "tracks": len(decoding.container.streams.audio),
        "container": decoding.container.format.name,
        "codec": stream.codec_context.name,
        "rate_hz": decoding.rate_hz,
        "channels": stream.channels,
        "encoder_delay_samples": decoding.delay,
        "seconds": levels.count / decoding.rate_hz,
        "goes_on": levels.goes_on,
        "seconds_in_all": _seconds_in_all(decoding, levels),
        "peak": levels.peak,
    }


def _seconds_in_all(decoding: Decoding, levels: Levels) -> float | None:
    """Of the part that is meant, also behind what was read of it: as the file says, which some say nearly only, and
    None where it does not."""
    sound, stream, container = decoding.sound, decoding.stream, decoding.container
    read_s = levels.count / decoding.rate_hz
    if not levels.goes_on:
        return read_s
    if stream.duration and stream.time_base:
        stated = float(stream.duration * stream.time_base)
    elif container.duration and container.duration > 0:
        stated = container.duration / 1e6
    else:
        return sound.duration_s
    left = stated - sound.start_s
    return max(read_s, left if sound.duration_s is None else min(left, sound.duration_s))
