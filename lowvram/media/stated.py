"""Lengths that sound files state in front, to be compared with what really is in them."""

import os
import re
import struct
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

from av.audio.stream import AudioStream
from av.container import InputContainer

_Order: TypeAlias = Literal["big", "little"]
# Of these FFmpeg gives the length that stands in the file. Of all others it is guessed from the file's size or end,
# which is the same for a whole file and for one that was cut.
_STATED = frozenset(
    [
        "aiff",
        "ape",
        "asf",
        "au",
        "dsf",
        "flac",
        "flv",
        "matroska",
        "mov",
        "mp3",
        "mpc",
        "mpc8",
        "nistsphere",
        "oma",
        "qoa",
        "rm",
        "shn",
        "sox",
        "tak",
        "tta",
        "webm",
        "wv",
        "xwma",
    ]
)
_RF64, _W64 = (b"RF64", b"BW64"), b"riff\x2e\x91\xcf\x11"
# Programs that write into a pipe put one of these where they do not know the size.
_UNKNOWN = (0, 0x7FFF_F000, 0x7FFF_FFFF, 0x8000_0000)
_UNKNOWN_FROM = 0xFFFF_FF00
_MOST_CHUNKS = 100
_MOST_AVI_HEAD = 1 << 16


def stated_seconds(path: Path, container: InputContainer, stream: AudioStream, there_s: float) -> float | None:
    """Seconds of sound that the file's header states, of which ``there_s`` are there; None where it states none."""
    formats = container.format.name.split(",")
    if "mp3" in formats and not stream.start_time:
        return None  # without LAME's tag the length is guessed from the size
    if not _STATED.isdisjoint(formats):
        return _said(container, stream)
    if "avi" in formats:
        return _avi_seconds(path, container.streams.audio.index(stream))
    # FFmpeg cuts what these state at the end of the file.
    share = _share_there(path)
    return None if share is None else there_s / share


def _said(container: InputContainer, stream: AudioStream) -> float | None:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if tag := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):  # Matroska, a track
        return 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3])
    # Of the whole file: other tracks may be longer.
    alone = len(container.streams) == 1
    return container.duration / 1e6 if alone and container.duration and container.duration > 0 else None


def _avi_seconds(path: Path, track: int) -> float | None:
    """By the header of AVI's sound track number ``track``."""
    with path.open("rb") as file:
        head = file.read(_MOST_AVI_HEAD)
    found = list(re.finditer(rb"strh.{4}auds", head, re.DOTALL))
    if track >= len(found):
        return None
    # Behind kind, codec, flags, priority and language, and the first frame's delay, of 4 bytes each.
    scale, rate, _, length = struct.unpack_from("<4I", head, found[track].start() + 8 + 20)
    return scale * length / rate if rate else None


def _share_there(path: Path) -> float | None:
    """Of a WAV, RF64, Wave64 or CAF file: which part of the samples, or of the whole, is there; None of a whole one,
    and where its writer did not know."""
    size = os.path.getsize(path)
    with path.open("rb") as file:
        head = file.read(28)
        if head.startswith(_W64):
            return _share(size, int.from_bytes(head[16:24], "little"))
        if head[:4] in _RF64:  # its first chunk has the size in 64 bits
            return _share(size, int.from_bytes(head[20:28], "little") + 8)
        if head[:4] == b"caff":
            return _share_of_chunk(file, size, 8, 8, "big")
        order: _Order = "big" if head[:4] == b"RIFX" else "little"
        wave = head[:4] in (b"RIFF", b"RIFX") and head[8:12] == b"WAVE"
        return _share_of_chunk(file, size, 12, 4, order) if wave else None


def _share_of_chunk(file: BinaryIO, size: int, at: int, width: int, order: _Order) -> float | None:
    """Of the chunk "data"; the first chunk is ``at`` there, sizes have ``width`` bytes, and only RIFF's chunks begin at
    even places."""
    for _ in range(_MOST_CHUNKS):
        file.seek(at)
        name, stated = file.read(4), int.from_bytes(file.read(width), order)
        if len(name) < 4:
            return None
        begin = at + 4 + width
        if name == b"data":
            unknown = width == 4 and (stated in _UNKNOWN or stated >= _UNKNOWN_FROM)
            return None if unknown or stated >= 2**63 else _share(size - begin, stated)
        at = begin + stated + (stated % 2 if width == 4 else 0)
    return None


def _share(there: int, stated: int) -> float | None:
    return there / stated if 0 < there < stated else None
