"""A fragmented MP4, as it is written, made into an ordinary one: one index in front, and a length that players show."""

import errno
import functools
import itertools
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import av
from av.container import InputContainer, OutputContainer

logger = logging.getLogger(__name__)

# The index goes in front, so that a video plays while it is still being loaded.
ORDINARY = {"movflags": "faststart"}
# The same, and metadata under any name; otherwise the muxer keeps those that players show.
ANY_METADATA = {"movflags": "faststart+use_metadata_tags"}


def finish(fragmented: Path, finished: Path, metadata: Mapping[str, str] | None = None) -> bool:
    """Give a whole fragmented MP4 its final name, as an ordinary MP4; nothing is encoded again.

    The ordinary file is made beside the fragmented one, which goes only when the other has the final name. Where it
    cannot be made (a full disk) the fragmented file, which holds the same pictures and sound, gets the name instead,
    with a warning. ``metadata``: what the file is to say of itself beside its streams.

    Returns:
        Whether the file is an ordinary MP4.

    Raises:
        OSError: the final name cannot be given; the fragmented file is where it was.
    """
    beside = _unused(finished)
    copy = functools.partial(_copy, metadata=metadata) if metadata else _copy
    try:
        copy(fragmented, beside)
        os.replace(beside, finished)
    except (av.FFmpegError, OSError) as error:
        beside.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        os.replace(fragmented, finished)
        logger.warning(
            "%s stays a fragmented MP4: %s, expected room for a second copy of it while it is finished; it holds all "
            "pictures and sound, and some players show no length",
            finished,
            "the disk is full" if full else f"it could not be copied ({error.strerror or error})",
        )
        return False
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    fragmented.unlink(missing_ok=True)
    return True


def _copy(source: Path, target: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Copy the packets of all streams, with their times, into an MP4 that has its index in front."""
    options = ANY_METADATA if metadata else ORDINARY
    with (
        av.open(f"file:{source.absolute()}", options={"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2"}) as given,
        av.open(f"file:{target.absolute()}", "w", "mp4", options=options) as made,
    ):
        made.metadata.update(metadata or {})
        _copy_packets(given, made)


def _copy_packets(given: InputContainer, made: OutputContainer) -> None:
    streams = {stream.index: made.add_stream_from_template(stream) for stream in given.streams}
    for packet in given.demux():
        if packet.dts is None:  # the end of a stream
            continue
        packet.stream = streams[packet.stream.index]
        made.mux(packet)


def _unused(finished: Path) -> Path:
    """A name beside the final one that nothing has; what a killed run left there stays."""
    names = (f"{finished.stem}.finishing{number or ''}{finished.suffix}" for number in itertools.count())
    return next(path for path in map(finished.with_name, names) if not os.path.lexists(path))
