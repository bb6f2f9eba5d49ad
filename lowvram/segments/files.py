"""A take's files: segments one after the other, and behind each of them the state that the next one goes on from."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch

from lowvram.media.join import check, read_part
from lowvram.media.segment import Segment
from lowvram.media.sound import Sound
from lowvram.media.video import VideoWriter
from lowvram.segments.store import State, folder_of, latest, save
from lowvram.segments.take import Take
from lowvram_kernels.errors import InputError
from lowvram_models.constants import FPS

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11 on

Tensor = torch.Tensor
log = logging.getLogger(__name__)


def segment_path(video: Path, number: int) -> Path:
    """Of ``avatar.mp4`` the first is ``avatar-000.mp4``."""
    return video.with_name(f"{video.stem}-{number:03d}{video.suffix}")


def segments_there(video: Path) -> list[Path]:
    """Files that are called like segments of ``video``, in their order."""
    name = re.compile(re.escape(video.stem) + r"-(\d{3,})" + re.escape(video.suffix))
    folder = video.parent if video.parent.is_dir() else None
    found = [
        (int(match[1]), path) for path in (folder.iterdir() if folder else ()) if (match := name.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def finished_segments(video: Path, take: str) -> list[Path]:
    """All segments of a take that is finished; none where it is not."""
    paths = segments_there(video)
    try:
        parts = [read_part(path) for path in paths]
        if not parts or parts[0].facts.take != take:
            return []
        check(parts)
    except InputError:
        return []
    return paths


class SegmentFiles:
    """Writes the segments of a take, beside ``video``, whose name they take. As a context manager, an exception leaves
    the segment that is being made under its partial name, playable as far as it goes.

    Args:
        take: what the take is called: a checksum of all that goes into it.
        resume: go on from the state that is there; where none is, from the beginning.
        overwrite: segments of before may go.

    Raises:
        InputError: segments are there and may not go; what is there is of another take, or incomplete; a file that is
            in the way is no segment.
    """

    def __init__(
        self,
        video: Path,
        take: str,
        *,
        height: int,
        width: int,
        sound: Sound | tuple[Sound, ...] | Path | None,
        resume: bool,
        overwrite: bool = False,
    ) -> None:
        self.video, self._take, self._size, self._sound = video, take, (height, width), sound
        self._place = folder_of(video)
        self.resumed = latest(self._place) if resume else None
        if self.resumed is not None:
            self._check(self.resumed)
        elif resume:
            log.warning("%s holds no state to go on from: the take begins at its beginning", self._place)
        self.paths = [video.with_name(name) for name in self.resumed.segments] if self.resumed else []
        self._frames = self.resumed.frames if self.resumed else 0
        self._writer: VideoWriter | None = None
        self.frames_written, self.fragmented = self._frames, False
        if not (resume or overwrite) and (there := segments_there(video)):
            raise InputError(
                f"{there[0]} is there already, a segment of an earlier take: go on with it by --resume, replace it by "
                "--overwrite, or choose another --out"
            )
        self._clear(others_too=overwrite)

    def take(self, segment_minutes: float) -> Take:
        """What the pipeline is to make of it."""
        frames = max(1, round(segment_minutes * 60 * FPS))
        if self.resumed is None:
            return Take(segment_frames=frames)
        return Take(segment_frames=frames, next_block=self.resumed.next_block, state=self.resumed.part)

    def write(self, frames: np.ndarray) -> None:
        """Write a block's frames, uint8 [k, H, W, 3], as ``VideoWriter.write`` does."""
        if self._writer is None:
            path = segment_path(self.video, len(self.paths))
            segment = Segment(take=self._take, first_frame=self._frames)
            self._writer = VideoWriter(path, *self._size, FPS, audio_path=self._sound, segment=segment)
        self._writer.write(frames)

    def cut(self, next_block: int, parts: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
        """Finish the segment, and save the state that block ``next_block`` goes on from."""
        self._finish(goes_on=True)
        state = State(
            folder=self._place / f"{len(self.paths):03d}",
            take=self._take,
            next_block=next_block,
            segments=tuple(path.name for path in self.paths),
            frames=self._frames,
        )
        save(self._place, state, parts)

    def _finish(self, *, goes_on: bool) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        writer.goes_on = goes_on
        writer.close()
        self.paths.append(writer.path)
        self._frames += writer.frames_written
        self.frames_written, self.fragmented = self._frames, self.fragmented or writer.fragmented

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish(goes_on=False)
            shutil.rmtree(self._place, ignore_errors=True)
        elif self._writer is not None:
            self._writer.abort()

    def _check(self, state: State) -> None:
        if state.take != self._take:
            raise InputError(
                f"{state.folder} is of another take: portrait, voice, prompt, model or an option is not what it was; "
                "give those of before, or begin again without --resume"
            )
        for name in state.segments:
            path = self.video.with_name(name)
            if not path.is_file() or read_part(path).facts.take != self._take:
                raise InputError(
                    f"{path} is missing, or of another take: expected the segments that were finished; bring it back, "
                    "or begin again without --resume"
                )

    def _clear(self, *, others_too: bool) -> None:
        """Let go of segments and states that this take replaces: its own, and those of ``others_too`` where they may
        go. Nothing goes where one may not."""
        replaced = [path for path in segments_there(self.video) if path not in self.paths]
        for path in replaced:
            try:
                take = read_part(path).facts.take
            except InputError as error:
                raise InputError(f"{path} is in the way of a segment, and is none: move it elsewhere") from error
            if take != self._take and not others_too:
                raise InputError(
                    f"{path} is a segment of another take, and no state is there to go on from: portrait, voice, "
                    "prompt, model or an option is not what it was; replace it by --overwrite, or choose another --out"
                )
        for path in replaced:
            path.unlink()
        if self.resumed is None:
            shutil.rmtree(self._place, ignore_errors=True)
