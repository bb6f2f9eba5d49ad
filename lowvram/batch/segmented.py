"""Jobs whose videos are made in segments, so that one that was cut goes on, and are one file in the end."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from lowvram.infer import take_of, write_json
from lowvram.media.join import join
from lowvram.outputs import Outputs
from lowvram.pipeline import AvatarPipeline
from lowvram.request import Request
from lowvram.segments.files import segments_there
from lowvram.segments.store import folder_of, latest
from lowvram_kernels.errors import InputError, OutputError
from lowvram_quantize.places import real


def in_segments(pipeline: AvatarPipeline, request: Request, outputs: Outputs, minutes: float, *, anew: bool) -> Outputs:
    """The same, in segments of so many minutes; what an earlier run has made of the same take goes on.

    Raises:
        InputError: what is begun there is of another take, and is not to be begun ``anew``.
    """
    video = real(outputs.video)
    place = folder_of(video)
    state = latest(place) if place.is_dir() else None
    if state is None:
        return dataclasses.replace(outputs, segment_minutes=minutes, resume=bool(segments_there(video)))
    same = state.take == take_of(pipeline, request)
    if not (same or anew):
        raise InputError(
            f"{place} is of a video that was cut, and portrait, voice, prompt, model or a setting is not what it was; "
            "give those of before, or begin again with --overwrite"
        )
    return dataclasses.replace(outputs, segment_minutes=minutes, resume=same)


def joined(outputs: Outputs, report: dict[str, Any]) -> dict[str, Any]:
    """Make one file of a take's segments, which go then, and say so in its report.

    Raises:
        InputError: a segment that cannot be joined.
        OutputError: no room, or the file cannot be written; the segments stay, and are joined when it is run again.
    """
    segments, partial = [Path(path) for path in report["segments"]], outputs.partial
    try:
        frames = join(segments, partial)
        os.replace(partial, real(outputs.video))
    except OSError as error:
        raise OutputError(f"{outputs.video} cannot be written ({error.strerror or error}); free some space") from error
    finally:
        partial.unlink(missing_ok=True)
    made = report | {"frames_written": frames, "fragmented": False, "video": str(outputs.video.absolute())}
    if outputs.report is not None:
        write_json(real(outputs.report), made)
    for path in segments:
        path.unlink(missing_ok=True)
    return made
