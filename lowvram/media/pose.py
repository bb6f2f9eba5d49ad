"""Pose video: pictures of a moving skeleton that the avatar follows, at the video's rate and size."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Generator
from fractions import Fraction
from pathlib import Path

import av
import torch
from PIL import Image

from lowvram.media.image import portrait_tensor
from lowvram.media.reading import open_video
from lowvram_kernels.errors import InputError
from lowvram_models.constants import FPS

Tensor = torch.Tensor
log = logging.getLogger(__name__)


def check_pose(path: Path) -> None:
    """Raises: InputError: missing, no video, or without a picture that decodes."""
    with contextlib.closing(_pictures(path)) as pictures:
        if next(pictures, None) is None:
            raise InputError(f"pose video {path} has no picture that decodes; expected a video of poses")


def pose_clips(path: Path, clips: int, clip_frames: int, height: int, width: int) -> Generator[Tensor, None, None]:
    """Yield [3, clip_frames, height, width] in [-1, 1] for each clip: what stands there at each frame's time; black,
    which says nothing, behind the video's end.

    Raises:
        InputError: as of ``check_pose``.
    """
    with contextlib.closing(_pictures(path)) as pictures:
        for clip in range(clips):
            shown = enumerate(itertools.islice(pictures, clip_frames))
            frames = [portrait_tensor(image, height, width, said=clip + place == 0) for place, image in shown]
            if len(frames) < clip_frames:
                if frames:
                    log.warning(
                        "pose video %s ends in clip %d of %d: behind it none is followed", path, clip + 1, clips
                    )
                frames += [torch.full((3, height, width), -1.0)] * (clip_frames - len(frames))
            yield torch.stack(frames, dim=1)


def _pictures(path: Path) -> Generator[Image.Image, None, None]:
    """The picture that is shown at each frame's time; that of before, until the next one comes."""
    shown: Image.Image | None = None
    index, begin = 0, None
    try:
        with open_video(path, "pose video") as container:
            for frame in container.decode(video=0):
                time = Fraction(frame.pts or 0) * (frame.time_base or Fraction(1))
                begin = time if begin is None else begin
                while shown is not None and Fraction(index, FPS) + Fraction(1, 1000) < time - begin:
                    yield shown
                    index += 1
                shown = frame.to_image()
            if shown is not None:
                yield shown
    except (av.FFmpegError, OSError) as error:
        if shown is None:
            raise InputError(f"pose video {path} does not decode ({error}): expected a whole video") from error
        log.warning("pose video %s breaks off (%s): behind that none is followed", path, error)
