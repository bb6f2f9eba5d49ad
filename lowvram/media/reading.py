"""A video read back: what it holds, and its frames."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray

from lowvram_kernels.errors import InputError

logger = logging.getLogger(__name__)
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"  # none that can name other files


def probe(path: str | PathLike[str]) -> dict[str, Any]:
    """What a video holds, counted from its packets without decoding them.

    Returns:
        ``frames``, ``width`` and ``height`` in px, ``fps``, ``duration_s`` of the picture, ``has_audio`` and
        ``audio_duration_s`` (0.0 without sound).

    Raises:
        InputError: missing, not a video, damaged.
    """
    with open_video(Path(path)) as container:
        video = container.streams.video[0]
        sound = container.streams.audio[0] if container.streams.audio else None
        frames, sound_end_s = 0, 0.0
        for packet in _packets(Path(path), container, *([video] if sound is None else [video, sound])):
            if packet.size and packet.stream.index == video.index:
                frames += 1
            elif packet.size and packet.pts is not None:
                sound_end_s = max(sound_end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        fps = float(video.average_rate or video.base_rate or 0)
        return {
            "frames": frames,
            "width": video.width,
            "height": video.height,
            "fps": fps,
            "duration_s": frames / fps if fps else 0.0,
            "has_audio": sound is not None,
            "audio_duration_s": sound_end_s,
        }


def read_frames(path: str | PathLike[str]) -> Iterator[NDArray[np.uint8]]:
    """The frames of a video in order, one at a time, each uint8 [H, W, 3] RGB.

    Of a file that was cut, the frames before the cut come, then a warning.

    Raises:
        InputError: missing, not a video, or no frame of it decodes.
    """
    count = 0
    with open_video(Path(path)) as container:
        try:
            for packet in _packets(Path(path), container, container.streams.video[0]):
                for frame in packet.decode():
                    count += 1
                    yield frame.to_ndarray(format="rgb24")
        except (av.FFmpegError, InputError) as error:
            if count == 0:
                raise InputError(f"video {path} does not decode ({error}): expected a whole video") from error
            logger.warning("video %s breaks off after %d frames (%s)", path, count, error)


def open_video(path: Path, what: str = "video") -> InputContainer:
    """A file with a picture track; ``what`` it is called in errors.

    Raises:
        InputError: missing, or no video.
    """
    if not path.is_file():
        raise InputError(f"{what} {path} is not a file: expected a video; check the path")
    try:
        container = av.open(
            f"file:{path.absolute()}", options={"format_whitelist": _DEMUXERS}, metadata_errors="replace"
        )
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{what} {path} cannot be read ({error.strerror}): expected an MP4; check the file") from error
    if not container.streams.video:
        container.close()
        raise InputError(f"{what} {path} has no picture: expected a video; choose another file")
    return container


def _packets(path: Path, container: InputContainer, *streams: Any) -> Iterator[Any]:
    try:
        yield from container.demux(*streams)
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"video {path} breaks off ({error.strerror}): expected a whole file") from error
