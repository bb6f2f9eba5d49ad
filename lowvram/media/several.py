"""Several people in one picture: their portraits side by side, where each of them is, and their voices mixed."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from av.audio.frame import AudioFrame
from PIL import Image, ImageDraw

from lowvram.media.audio import AudioTrack
from lowvram.media.image import Portrait, fitted, read_portrait
from lowvram.media.sound import Sound
from lowvram_kernels.errors import InputError

Tensor = torch.Tensor
PIXELS_PER_TOKEN = 16
# Of the longer side of the box around a person: so far around them nobody else is heard.
_MARGIN = 0.1


def names_of(path: Path, folder: Path | None = None) -> tuple[Path, ...]:
    """The files that are meant, as they are called in ``folder`` or the working directory: of "a.wav+b.wav" both,
    unless that is the name of a file itself. A "+" within a name or a folder divides nothing where the files are there;
    where they are not, each has to have an ending."""
    parts = str(path).split("+")
    if len(parts) == 1 or os.path.lexists((folder or Path()) / path):
        return (path,)
    if found := _there(parts, folder or Path()):
        return tuple(Path(name) for name in found)
    return tuple(Path(part) for part in parts) if all(Path(part).suffix for part in parts) else (path,)


def joined(paths: Sequence[Path]) -> Path:
    """What ``names_of`` takes apart again."""
    return Path("+".join(str(path) for path in paths))


def _there(parts: Sequence[str], folder: Path) -> list[str]:
    """The fewest files, all in ``folder``, whose names with "+" between them are these parts; none where none are."""
    behind: list[list[str] | None] = [None] * len(parts) + [[]]
    for first in reversed(range(len(parts))):
        for last in range(first + 1, len(parts) + 1):
            rest, known = behind[last], behind[first]
            if rest is None or (known is not None and len(known) <= len(rest) + 1):
                continue
            if os.path.isfile(folder / (name := "+".join(parts[first:last]))):
                behind[first] = [name, *rest]
    return behind[0] or []


@dataclasses.dataclass(frozen=True)
class Group:
    """One picture of all people, and of each a picture of the same size, "L", white where that person is. ``given``:
    these were drawn by somebody, and people have something between them; otherwise they share the whole picture."""

    portrait: Portrait
    masks: tuple[Image.Image, ...] = ()
    given: bool = False


def read_group(images: Sequence[Path], masks: Sequence[Path], people: int) -> Group:
    """Read the portrait of so many people: one picture of all, which ``masks`` divide in the order of the voices, or
    equal parts from left to right; or a picture of each, which are put side by side.

    Raises:
        InputError: a picture that cannot be read; more or fewer of them than people; a mask of another size than the
            portrait, or without any white.
    """
    if len(images) not in (1, people):
        raise InputError(f"--image names {len(images)} portraits for {people} voices; expected one of all, or one each")
    if masks and len(images) > 1:
        raise InputError("--mask says where people are in one portrait, and --image names several; give one of both")
    if masks and people == 1:
        raise InputError("--mask says who speaks where several do, and there is one voice; give --audio a.wav+b.wav")
    if masks and len(masks) != people:
        raise InputError(f"--mask was given {len(masks)} times for {people} voices; expected one of each person")
    portraits = [read_portrait(path) for path in images]
    if people == 1:
        return Group(portraits[0])
    if masks:
        there = tuple(_read_mask(path, portraits[0].image.size) for path in masks)
        return Group(portraits[0], there, given=True)
    together, edges = _side_by_side(portraits)
    if len(portraits) == 1:
        edges = [round(together.image.width * index / people) for index in range(people + 1)]
    return Group(together, tuple(_strip(together.image.size, edges[i], edges[i + 1]) for i in range(people)))


def _read_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    try:
        mask = read_portrait(path).image.convert("L")
    except InputError as error:
        raise InputError(str(error).replace("portrait", "mask", 1)) from error
    if mask.size != size:
        raise InputError(
            f"mask {path} is {mask.width}x{mask.height} px, and the portrait {size[0]}x{size[1]}; expected one of the "
            "same size, white where the person is"
        )
    if int(np.asarray(mask).max()) < 128:
        raise InputError(f"mask {path} has nothing white; expected white where the person is")
    return mask


def _side_by_side(portraits: Sequence[Portrait]) -> tuple[Portrait, list[int]]:
    """At the height of the lowest; and where each begins and the last ends."""
    if len(portraits) == 1:
        return portraits[0], []
    height = min(portrait.image.height for portrait in portraits)
    scaled = [
        portrait.image.convert("RGB").resize(
            (max(1, round(portrait.image.width * height / portrait.image.height)), height), Image.Resampling.LANCZOS
        )
        for portrait in portraits
    ]
    edges = [0]
    for image in scaled:
        edges.append(edges[-1] + image.width)
    whole = Image.new("RGB", (edges[-1], height))
    for image, left in zip(scaled, edges, strict=False):
        whole.paste(image, (left, 0))
    facts: dict[str, Any] = {"width": edges[-1], "height": height, "of": [portrait.facts for portrait in portraits]}
    return Portrait(image=whole, facts=facts), edges


def _strip(size: tuple[int, int], left: int, right: int) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((left, 0, right - 1, size[1] - 1), fill=255)
    return mask


def token_masks(group: Group, height: int, width: int) -> Tensor | None:
    """Where each person is heard, float32 [people, tokens of a latent frame], of a video of ``height`` x ``width`` px:
    everywhere but where others are, and a margin around those that were drawn. None of one person.

    Source: the reference's masks, which exclude the others' grown by a tenth of their boxes.
    """
    if not group.masks:
        return None
    grids = [_on_tokens(mask, height, width) for mask in group.masks]
    if group.given:
        grids = [_grown(grid) for grid in grids]
    present = torch.stack(grids)
    others = present.sum(dim=0, keepdim=True) - present
    return (others == 0).flatten(1).to(torch.float32)


def _on_tokens(mask: Image.Image, height: int, width: int) -> Tensor:
    """0 or 1 for each token: whether at least half of it is the person's."""
    pixels = torch.from_numpy(np.array(fitted(mask.convert("RGB"), height, width, said=False))[..., 0].copy())
    shares = torch.nn.functional.avg_pool2d(pixels[None].float() / 255, PIXELS_PER_TOKEN)[0]
    return (shares >= 0.5).to(torch.float32)


def _grown(grid: Tensor) -> Tensor:
    rows, columns = torch.where(grid > 0)
    if not len(rows):
        return grid
    longest = int(max(rows.max() - rows.min(), columns.max() - columns.min())) + 1
    reach = max(1, math.ceil(_MARGIN * longest))
    return torch.nn.functional.max_pool2d(grid[None], 2 * reach + 1, stride=1, padding=reach)[0]


class MixedTrack:
    """Several sounds as one ``AudioTrack``; it ends with the first of them that does."""

    rate_hz = AudioTrack.rate_hz

    def __init__(self, sounds: Sequence[Sound]) -> None:
        self._tracks: list[AudioTrack] = []
        try:
            for sound in sounds:
                self._tracks.append(AudioTrack(sound))
        except BaseException:
            self.close()
            raise
        self.layout = "mono" if all(track.layout == "mono" for track in self._tracks) else "stereo"

    def read(self, samples: int) -> AudioFrame | None:
        """As of ``AudioTrack``."""
        frames = [track.read(samples) for track in self._tracks]
        planes = [frame.to_ndarray() for frame in frames if frame is not None]
        if len(planes) < len(frames):
            return None
        length, channels = min(plane.shape[1] for plane in planes), 1 if self.layout == "mono" else 2
        mixed = np.zeros((channels, length), np.float32)
        for plane in planes:
            mixed += plane[:, :length]
        frame = AudioFrame.from_ndarray(np.clip(mixed, -1, 1), format="fltp", layout=self.layout)
        frame.sample_rate = self.rate_hz
        return frame

    def close(self) -> None:
        """Close all files; safe to call twice."""
        for track in self._tracks:
            track.close()


def open_track(sound: str | os.PathLike[str] | Sound | Sequence[Sound]) -> AudioTrack | MixedTrack:
    """A file's sound, or several mixed.

    Raises:
        InputError: as of ``AudioTrack``.
    """
    if isinstance(sound, str | os.PathLike | Sound):
        return AudioTrack(sound)
    return MixedTrack(sound) if len(sound) > 1 else AudioTrack(sound[0])
