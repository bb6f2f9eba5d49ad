"""Segments of a take put behind one another: packets are copied, nothing is encoded again."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer, OutputContainer

from lowvram.media.finish import ORDINARY
from lowvram.media.segment import AAC_SAMPLES, SegmentFacts, aac_frames_until
from lowvram_kernels.errors import InputError, OutputError

# Packets as they lie there: what is left out at the start is known by the facts, and an edit list that leaves less than
# a millisecond is read as none.
_OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2", "ignore_editlist": "1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A segment's file: its facts, with the frames that its index has; what its streams are coded as; and by how many
    frames its pictures are decoded before they are shown."""

    path: Path
    facts: SegmentFacts
    frames: int
    picture: dict[str, Any]
    sound: dict[str, Any] | None
    ahead: int

    @property
    def next_frame(self) -> int:
        """Of the take, behind this segment."""
        return self.facts.first_frame + self.frames


def join(paths: Sequence[Path], out: Path, *, unfinished: bool = False) -> int:
    """Write ``out``, an ordinary MP4 with its index in front, of all segments of a take in their order. Returns its
    frames.

    Memory does not grow with the length, but for the index. ``out`` itself is written: who wants it under another name
    until it is whole gives that one.

    Args:
        unfinished: whether the last segment may be one that the take goes on behind.

    Raises:
        InputError: a file that is no segment, or damaged; segments of several takes, missing ones, others than in their
            order, or coded differently.
        OutputError: ``out`` cannot be written.
    """
    parts = [read_part(path) for path in paths]
    check(parts, unfinished=unfinished)
    try:
        with av.open(f"file:{out.absolute()}", "w", "mp4", options=ORDINARY) as made:
            _copy(parts, made)
    except (av.FFmpegError, OSError) as error:
        raise OutputError(
            f"{out} cannot be written ({error.strerror or error}): expected a folder with room for it; free some space "
            "or choose another"
        ) from error
    return parts[-1].next_frame


def read_part(path: Path) -> Part:
    """What a segment's file holds, from its header and first packets.

    Raises:
        InputError: missing, no video, or no segment of a take.
    """
    with _opened(path) as container:
        facts = SegmentFacts.from_metadata(dict(container.metadata))
        if facts is None:
            raise InputError(
                f"{path} does not say what it is a segment of; expected a segment as lowvram wrote it (what edits or "
                "converts videos leaves that out)"
            )
        picture = container.streams.video[0]
        sound = container.streams.audio[0] if container.streams.audio else None
        frames = picture.frames
        ahead: int | None = None
        try:
            for packet in container.demux(picture):
                if packet.dts is None:
                    continue
                if ahead is None:
                    ahead = (packet.pts or 0) - packet.dts
                if picture.frames:
                    break
                frames += 1  # a fragmented file has no count of them
        except (av.FFmpegError, OSError) as error:
            raise _damaged(path, error.strerror or str(error)) from error
        if ahead is None or picture.time_base is None or (facts.frames is not None and facts.frames != frames):
            raise _damaged(path, f"it says {facts.frames} frames and has {frames}")
        return Part(
            path=path,
            facts=facts,
            frames=frames,
            picture=_coding(picture, ("width", "height", "pix_fmt", "profile")),
            sound=None if sound is None else _coding(sound, ("sample_rate", "channels", "profile")),
            ahead=round(ahead * picture.time_base * facts.fps),
        )


def check(parts: Sequence[Part], *, unfinished: bool = False) -> None:
    """Whether they are all segments of one take, in their order.

    Raises:
        InputError: what came, what was expected and what to do.
    """
    first = parts[0]
    for part in parts:
        if part.facts.take != first.facts.take:
            raise InputError(
                f"{part.path} is of another take than {first.path} ({_short(part)} and {_short(first)}); give segments "
                "of one"
            )
    in_order = sorted(parts, key=lambda part: part.facts.first_frame)
    if [part.facts.first_frame for part in in_order] != [part.facts.first_frame for part in parts]:
        names = " ".join(part.path.name for part in in_order)
        raise InputError(f"segments are not given in their order; expected {names}")
    expected = 0
    for before, part in zip([None, *parts], parts, strict=False):
        _check_place(before, part, expected)
        _check_coding(first, part)
        expected = part.next_frame
    _check_sound(parts)
    last = parts[-1]
    if last.facts.goes_on and not unfinished:
        raise InputError(
            f"the take goes on behind {last.path}, at frame {last.next_frame}; give the segments that follow, or "
            "--unfinished to join what is here"
        )


def _check_place(before: Part | None, part: Part, expected: int) -> None:
    begin = part.facts.first_frame
    if begin == expected:
        return
    where = "a take begins" if before is None else f"{before.path} ends"
    said = f"{part.path} begins with frame {begin} of its take, and {where} at frame {expected}"
    if begin > expected:
        raise InputError(f"{said}: {begin - expected} frames are missing; give the segments between too")
    raise InputError(f"{said}: {expected - begin} frames would be there twice; give one of the two")


def _check_coding(first: Part, part: Part) -> None:
    for ours, theirs in ((first.picture, part.picture), (first.sound, part.sound)):
        if ours is None or theirs is None:
            continue
        different = [name for name in ours if ours[name] != theirs[name]]
        if first.facts.fps != part.facts.fps:
            different.append("fps")
        if different:
            one, other = ({n: v for n, v in side.items() if n != "extradata"} for side in (ours, theirs))
            what = ", ".join(different)
            raise InputError(
                f"{part.path} is coded differently from {first.path} ({what}: {other}, expected {one}); "
                "make both with one edition of lowvram and FFmpeg"
            )


def _check_sound(parts: Sequence[Part]) -> None:
    """Sound may end before the picture does, and not begin again."""
    for before, part in itertools.pairwise(parts):
        if part.sound is None:
            continue
        if before.sound is None or before.facts.sound_end not in (None, part.facts.sound_begin):
            ends = "has no sound" if before.sound is None else f"has sound to sample {before.facts.sound_end} only"
            raise InputError(
                f"{part.path} has sound from sample {part.facts.sound_begin} of the take on, and {before.path} {ends}; "
                "make the segments with the same voice"
            )


def _copy(parts: Sequence[Part], made: OutputContainer) -> None:
    ahead = max(part.ahead for part in parts)
    streams: dict[str, Any] = {}
    for place, part in enumerate(parts):
        follower = parts[place + 1] if place + 1 < len(parts) else None
        with _opened(part.path) as given:
            if not streams:
                streams = {each.type: made.add_stream_from_template(each) for each in _kept(given)}
            _copy_part(part, given, streams, made, ahead, follower)


def _copy_part(
    part: Part, given: InputContainer, streams: dict[str, Any], made: OutputContainer, ahead: int, follower: Part | None
) -> None:
    facts, frames, place = part.facts, 0, None
    begins: dict[str, int] = {}
    for packet in _packets(part.path, given):
        kind = packet.stream.type
        since = (packet.pts - begins.setdefault(kind, packet.pts)) * packet.time_base
        if kind == "video":  # the first is shown first
            _set_times(packet, facts.first_frame + round(since * facts.fps), facts.first_frame + frames - ahead, facts)
            frames += 1
        else:
            q = _aac_frame(part, since)
            if place is not None and q != place + 1:
                raise _damaged(part.path, f"its sound jumps from AAC frame {place} to {q}")
            place = q
            if not _taken(q, facts, follower):
                continue
            packet.pts = packet.dts = q * AAC_SAMPLES
            packet.time_base = Fraction(1, facts.rate_hz)
            if follower is not None and follower.sound is not None:
                packet.duration = AAC_SAMPLES
        packet.stream = streams[packet.stream.type]
        made.mux(packet)
    if frames != part.frames:
        raise _damaged(part.path, f"{frames} of {part.frames} frames are there")
    if facts.sound_end is not None and place != aac_frames_until(facts.sound_end) - 1:
        raise _damaged(part.path, f"its sound ends with AAC frame {place} instead of at sample {facts.sound_end}")


def _set_times(packet: Any, shown: int, decoded: int, facts: SegmentFacts) -> None:
    """As frames of the take; packets come in the order of decoding, one a frame, and are decoded at one pace, whatever
    segments they come from."""
    packet.pts, packet.dts = shown, decoded
    packet.duration, packet.time_base = 1, Fraction(1, facts.fps)


def _taken(q: int, facts: SegmentFacts, follower: Part | None) -> bool:
    """Whether an AAC frame comes from this segment: the one over a border is the one's before it."""
    begin = facts.sound_begin or 0
    if begin and q < aac_frames_until(begin):
        return False
    return follower is None or follower.sound is None or q < aac_frames_until(follower.facts.sound_begin or 0)


def _aac_frame(part: Part, since_s: Fraction) -> int:
    """Which of the take's it is, so much behind the first that the file has: the one before the first that is heard."""
    frames = since_s * part.facts.rate_hz / AAC_SAMPLES
    if frames.denominator != 1:
        raise _damaged(part.path, f"its sound lies {float(frames):g} AAC frames behind its begin; expected whole ones")
    return (part.facts.sound_begin or 0) // AAC_SAMPLES - 1 + int(frames)


def _packets(path: Path, given: InputContainer) -> Iterator[Any]:
    try:
        for packet in given.demux(*_kept(given)):
            if packet.dts is None:  # the end of a stream
                continue
            if packet.is_corrupt:
                raise _damaged(path, "it breaks off")
            yield packet
    except (av.FFmpegError, OSError) as error:
        raise _damaged(path, error.strerror or str(error)) from error


def _kept(given: InputContainer) -> list[Any]:
    return [*given.streams.video[:1], *given.streams.audio[:1]]


def _coding(stream: Any, names: tuple[str, ...]) -> dict[str, Any]:
    context = stream.codec_context
    return {"codec": context.name} | {name: getattr(context, name) for name in (*names, "extradata")}


def _opened(path: Path) -> InputContainer:
    if not os.path.isfile(path):
        raise InputError(f"segment {path} is not a file: expected an MP4 that lowvram made; check the path")
    try:
        container = av.open(f"file:{path.absolute()}", options=_OPTIONS, metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        raise InputError(
            f"segment {path} cannot be read ({error.strerror or error}): expected an MP4 that lowvram made, whole"
        ) from error
    if not container.streams.video:
        container.close()
        raise InputError(f"segment {path} has no picture: expected an MP4 that lowvram made; choose another file")
    return container


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"segment {path} is damaged: {what}; expected a whole file, make the segment again")


def _short(part: Part) -> str:
    return part.facts.take[:16]
