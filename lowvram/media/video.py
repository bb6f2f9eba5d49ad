"""The video: H.264 and AAC in an MP4 that is fragmented while frames come; what reads it back stands beside."""

import errno
import logging
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from lowvram.media.audio import TRACK_RATE_HZ
from lowvram.media.finish import finish
from lowvram.media.reading import probe, read_frames
from lowvram.media.segment import Segment, SegmentFacts, sample_at
from lowvram.media.several import open_track
from lowvram.media.sound import Sound
from lowvram.media.sound_writer import SoundWriter
from lowvram_kernels.errors import InputError, OutputError
from lowvram_models.constants import FPS

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
__all__ = ["VideoWriter", "probe", "read_frames"]

# veryfast at 448x768 takes 4 ms a frame on 2 cores, medium 6 ms for no smaller a file. Ten frames of look-ahead
# halve the file against none, and delay what is on the disk by half a second of video.
_X264 = {"preset": "veryfast", "crf": "18", "rc-lookahead": "10"}
_MAX_THREADS = 4  # each x264 thread holds back one more frame
_FRAGMENT_US = 480_000  # one block of 12 frames
_MUXER = {
    # delay_moov writes the header with the first fragment, when the AAC encoder's delay is known: sound stays in sync.
    "movflags": "frag_keyframe+empty_moov+default_base_moof+delay_moov",
    "frag_duration": str(_FRAGMENT_US),
    "max_interleave_delta": "1000000",  # a track that has ended holds the other back by a second at most
    "flush_packets": "1",
}


class VideoWriter:
    """Writes frames, and the sound that goes with them, to ``<stem>.partial.mp4``; a clean close makes the MP4 of it.

    The partial file is fragmented and playable up to its last fragment (half a second of video) at any moment, so a
    run that is killed keeps what it wrote. The finished one has one index in front of everything. Sound is read from
    ``audio_path`` as the video advances and ends where the video ends; with ``trim_to_audio`` frames that begin after
    the sound's end are not written but counted in ``frames_dropped``. Memory does not depend on the length, but for
    the index. As a context manager, an exception closes the partial file and leaves it there.

    Of a ``segment`` of a longer take the sound is the take's from where its first frame begins, encoded so that
    ``lowvram.media.join`` can put segments together without encoding again; alone it plays as any file. What it is a
    segment of stands in its metadata. ``goes_on``, to be set before it is closed, says there whether the take has more;
    it has none where frames end with the sound, and that ends here.

    Args:
        path: the ``.mp4`` to make, in a folder that exists; replaced if it exists.
        height, width: frame size in px, both even.
        fps: frames a second.
        audio_path: file with the sound, or the part of one that is meant, or None for a silent video; of a segment
            the sound of the whole take.
        segment: of which take it is, and where it begins there; None for a whole video.

    Raises:
        InputError: no such folder, a suffix other than ``.mp4``, or sound that cannot be read.
        OutputError: the file cannot be created.
        ValueError: an odd or non-positive height or width.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        height: int,
        width: int,
        fps: int = FPS,
        audio_path: str | os.PathLike[str] | Sound | Sequence[Sound] | None = None,
        trim_to_audio: bool = True,
        segment: Segment | None = None,
    ) -> None:
        self.path = _check_target(Path(path))
        self.partial_path = self.path.with_name(f"{self.path.stem}.partial{self.path.suffix}")
        if min(height, width) < 2 or height % 2 or width % 2:
            raise ValueError(f"expected an even height and width of at least 2, received {height} and {width}")
        self.height, self.width, self.fps = height, width, fps
        self.frames_written = self.frames_dropped = 0
        self.fragmented = True  # until an ordinary MP4 is made of it
        self._trim = trim_to_audio and audio_path is not None
        self._track = open_track(audio_path) if audio_path is not None else None
        self.segment, self.goes_on = segment, None if segment is None else False
        self._begin = 0 if segment is None else segment.first_frame
        self._closed = False
        try:
            self._guard(self._open)
        except BaseException:
            self._close_track()
            raise

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Encode frames, uint8 [k, H, W, 3] RGB (an array, or a tensor on the CPU), and the sound up to their end.

        Raises:
            ValueError: another shape or dtype, or the writer is closed.
            OutputError: a full disk, or any other failure to write.
            InputError: the sound turns out to be damaged.
        """
        frames = np.asarray(frames)
        expected = (self.height, self.width, 3)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != expected:
            raise ValueError(f"expected frames uint8 [k, {expected}], received {frames.dtype} {list(frames.shape)}")
        if self._closed:
            raise ValueError(f"the writer of {self.path} is closed")
        for frame in frames:
            self._guard(self._write_frame, frame)

    def close(self) -> None:
        """Finish the file and give it its final name. Does nothing when closed already.

        Where the disk has no room for the ordinary MP4 beside the fragmented one, that one gets the name, with a
        warning, and ``fragmented`` stays True.

        Raises:
            OutputError: no frame was written, a full disk, or any other failure; the partial file then stays.
        """
        if self._closed:
            return
        self._finish()
        if self.frames_written == 0:
            raise OutputError(f"{self.path} was not made: no frame was written, expected at least one; check the input")
        facts = self._facts()
        self.fragmented = not self._guard(finish, self.partial_path, self.path, facts and facts.to_metadata())

    def abort(self) -> None:
        """Close the partial file so that it plays as far as it goes, and leave it there; without a frame it goes."""
        if self._closed:
            return
        try:
            self._finish()
        except OutputError as error:
            logger.warning("%s: the last frames are lost (%s)", self.partial_path, error)
        if self.frames_written == 0:
            self.partial_path.unlink(missing_ok=True)
            return
        logger.warning("unfinished video left at %s: %d frames", self.partial_path, self.frames_written)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def _open(self) -> None:
        options = dict(_MUXER)
        if self.segment is not None:
            options["movflags"] += "+use_metadata_tags"
        self._container: OutputContainer = av.open(f"file:{self.partial_path.absolute()}", "w", "mp4", options=options)
        self._video = _add_video(self._container, self.height, self.width, self.fps)
        self._colours = VideoReformatter()  # one for all frames: what a frame brings itself makes its tables anew
        self._sound: SoundWriter | None = None
        if self._track is not None:
            begin = sample_at(self._begin, self._track.rate_hz, self.fps)
            self._sound = SoundWriter(self._container, self._track, begin, whole=self.segment is None)
        if (facts := self._facts()) is not None:
            self._container.metadata.update(facts.to_metadata())
        self._container.start_encoding()

    def _write_frame(self, pixels_HWC: NDArray[np.uint8]) -> None:
        index = self.frames_written + self.frames_dropped
        if self._sound is not None:
            self._sound.feed(self._sample_at(index + 1))
            if self._trim and self._sound.samples * self.fps <= (self._begin + index) * TRACK_RATE_HZ:
                self.frames_dropped += 1
                return
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HWC), format="rgb24")
        frame = self._colours.reformat(
            frame, format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        frame.pts, frame.time_base = index, Fraction(1, self.fps)
        self._container.mux(self._video.encode(frame))
        self.frames_written += 1

    def _sample_at(self, index: int) -> int:
        """The take's sample with which a frame of this file begins."""
        return sample_at(self._begin + index, TRACK_RATE_HZ, self.fps)

    def _facts(self) -> SegmentFacts | None:
        """What its file says of a segment, as far as it is known by now."""
        if self.segment is None:
            return None
        done, sound = self._closed, self._sound
        heard = sound is not None and sound.heard
        return SegmentFacts(
            take=self.segment.take,
            first_frame=self._begin,
            fps=self.fps,
            rate_hz=TRACK_RATE_HZ,
            sound_begin=self._sample_at(0) if heard else None,
            sound_end=sound.ended if sound is not None and heard and done else None,
            frames=self.frames_written if done else None,
            goes_on=self._goes_on() if done else None,
        )

    def _goes_on(self) -> bool | None:
        """Whether the take has more behind this segment: where frames end with the sound, not behind its end."""
        over = self._trim and self._sound is not None and not self._sound.goes_on
        return False if over else self.goes_on

    def _finish(self) -> None:
        self._closed = True
        try:
            self._guard(self._flush)
        finally:
            self._close_track()
            self._guard(self._container.close)

    def _flush(self) -> None:
        self._container.mux(self._video.encode(None))
        if self._sound is not None:
            self._sound.end(self._sample_at(self.frames_written))

    def _close_track(self) -> None:
        if self._track is not None:
            self._track.close()

    def _guard(self, step: Callable[..., _T], *arguments: Any) -> _T:
        try:
            return step(*arguments)
        except (av.FFmpegError, OSError) as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            advice = "free some space" if full else "check the folder and its permissions"
            raise OutputError(
                f"{self.partial_path} cannot be written ({error.strerror or error}): expected a writable file with "
                f"room for the video; {advice} and run again"
            ) from error


def _check_target(path: Path) -> Path:
    if path.suffix.lower() != ".mp4":
        raise InputError(f"output {path} ends in {path.suffix or 'nothing'!r}: expected .mp4; rename it")
    if not path.parent.is_dir():
        raise InputError(f"output folder {path.parent} does not exist: expected a folder; create it first")
    if path.is_dir():
        raise InputError(f"output {path} is a folder: expected the name of a file; choose another")
    return path


def _add_video(container: OutputContainer, height: int, width: int, fps: int) -> VideoStream:
    stream: VideoStream = container.add_stream("libx264", rate=fps, options=_X264)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    context = stream.codec_context
    context.gop_size = fps  # a key frame at least once a second
    context.thread_count = min(_MAX_THREADS, os.cpu_count() or 1)
    # BT.709, limited range, said in the file: untagged, players guess by the size.
    context.colorspace = context.color_primaries = context.color_trc = 1
    context.color_range = 1
    return stream
