"""The sound of a video that is being written: encoded as the picture advances, of a whole take or of a segment."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from av.audio.stream import AudioStream
from av.container import OutputContainer

from lowvram.media.audio import AudioTrack
from lowvram.media.segment import AAC_SAMPLES, aac_frames_until
from lowvram.media.several import MixedTrack

_AAC_BITS_A_CHANNEL = 96_000
# AAC frames that a segment's encoder is given before the first that is kept. Behind two of them it chooses the windows
# of an encoder that began with the take, and adjacent frames have to agree on those; bits differ however long it was.
_PRE_ROLL = 16
# A frame is transformed with the one behind it, and its window chosen by one more.
_LOOK_AHEAD = 2


class SoundWriter:
    """Encodes a take's sound from sample ``begin`` on, in AAC frames that are counted from the take's begin.

    Of a segment (``whole`` False) the encoder begins a little before and ends a little behind what is kept, on the
    take's own sound, so that frames of adjacent segments stand behind one another as if one encoder had made them.
    Samples are counted from the take's begin; times in the file from the segment's.
    """

    def __init__(self, container: OutputContainer, track: AudioTrack | MixedTrack, begin: int, *, whole: bool) -> None:
        self._container, self._track, self._whole, self._begin = container, track, whole, begin
        self._first = begin // AAC_SAMPLES - 1
        self.samples = 0  # that were read
        self.ended: int | None = None  # where the sound ends that is heard, once all of it is encoded
        self.goes_on = True  # whether there may be more of it behind that
        self._stream: AudioStream | None = None
        self._skip_to(max(0, self._first - _PRE_ROLL) * AAC_SAMPLES)
        self._waiting = self._read(begin + 1) if begin else None
        self.heard = self.samples > begin or not begin  # whether there is sound behind the begin, and a track for it
        if self.heard:
            self._stream = container.add_stream("aac", rate=track.rate_hz, layout=track.layout)
            self._stream.bit_rate = _AAC_BITS_A_CHANNEL * self._stream.layout.nb_channels

    def feed(self, until: int) -> None:
        """Encode the take's sound up to a sample, or to its end."""
        if self._stream is None:
            return
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._mux(self._stream.encode(waiting))
        if until <= self.samples:
            return
        frame = self._read(until)
        if frame is None:
            self._flush()
        else:
            self._mux(self._stream.encode(frame))

    def end(self, video_end: int) -> None:
        """Encode what is left of sound that ends with the picture, at a sample of the take, or before."""
        if not self._whole:
            self.feed(video_end)
            if self._stream is not None:
                self.ended = self.samples
                self.feed((aac_frames_until(self.samples) + _LOOK_AHEAD) * AAC_SAMPLES)
            self.goes_on = self.ended is not None and self.samples > self.ended
        self._flush()

    def _flush(self) -> None:
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        self.ended = self.samples if self.ended is None else self.ended
        self._mux(stream.encode(None))

    def _mux(self, packets: list[Any]) -> None:
        if self._whole:
            self._container.mux(packets)
            return
        for packet in packets:
            place = packet.pts // AAC_SAMPLES
            if place < self._first or (self.ended is not None and place >= aac_frames_until(self.ended)):
                continue
            if self.ended is not None:
                packet.duration = min(AAC_SAMPLES, self.ended - packet.pts)
            packet.pts -= self._begin
            packet.dts -= self._begin
            self._container.mux(packet)

    def _read(self, until: int) -> Any:
        frame = self._track.read(until - self.samples)
        if frame is not None:
            frame.pts, frame.time_base = self.samples, Fraction(1, self._track.rate_hz)
            self.samples += frame.samples
        return frame

    def _skip_to(self, sample: int) -> None:
        while self.samples < sample:
            if self._read(min(sample, self.samples + self._track.rate_hz)) is None:
                return
