"""Schedule: clips and blocks of a video, their noise, and which steps go through the layers together.

Source: model-spec section 3. C latent channels, F latent frames, h x w latent size.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import torch

from lowvram_kernels.errors import ConfigError
from lowvram_kernels.rounding import round_up
from lowvram_models.constants import DROPPED_FIRST_FRAMES, FRAMES_PER_LATENT, MOTION_FRAMES, MOTION_LATENTS

Tensor = torch.Tensor

FRAMES_PER_BLOCK = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A block of latent frames, number ``index`` of the video and ``slot`` of its clip: ``offset`` counts latent
    frames from its clip's start, ``first_frame`` from the video's."""

    clip: int
    index: int
    slot: int
    offset: int
    frames: int
    first_frame: int
    last_of_clip: bool

    @property
    def first_video_frame(self) -> int:
        """Of those that are shown."""
        return max(0, self.first_frame * FRAMES_PER_LATENT - DROPPED_FIRST_FRAMES)

    @property
    def sees_generated_reference(self) -> bool:
        """Whether the sink was filled from the first frame that was generated before this block came; it is just before
        the second clip's first block."""
        return self.clip > 1 or (self.clip == 1 and self.slot > 0)


class Denoised(NamedTuple):
    """A block whose last step is taken: its latent [C, F, h, w], float32, and the seconds spent on it, waits for other
    ranks included."""

    block: Block
    latent_CFhw: Tensor
    seconds: float


def latent_frames_per_clip(infer_frames: int) -> int:
    """Latent frames of a clip of ``infer_frames`` video frames behind 73 motion frames.

    Raises:
        ConfigError: ``infer_frames`` is no multiple of 4 from 12 on.
    """
    if infer_frames < 12 or infer_frames % 4:
        raise ConfigError(f"--infer_frames is {infer_frames}; expected a multiple of 4 from 12 on, 48 is usual")
    return (MOTION_FRAMES + infer_frames + 3) // FRAMES_PER_LATENT - MOTION_LATENTS


def frames_to_denoise(
    voice_frames: int, *, clips_in_audio: int, infer_frames: int, num_clip: int | None, dropped: int
) -> int:
    """Video frames to denoise for a voice of ``voice_frames``: all whole clips that the reference makes of it, and more
    where those end before the voice does.

    The reference counts clips by the features of the voice and forgets that the video's first ``dropped`` frames are
    not shown: a voice that ends within the last ones of a clip would lose its end. As many blocks of one clip more
    are made as hold it, unless ``num_clip`` clips are all that was asked for.
    """
    clips = clips_in_audio if num_clip is None else min(num_clip, clips_in_audio)
    frames = clips * infer_frames
    missing = voice_frames - (frames - dropped)
    if missing <= 0 or clips == num_clip:
        return frames
    block = FRAMES_PER_BLOCK * FRAMES_PER_LATENT
    return frames + min(round_up(missing, block), infer_frames)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extent:
    """How far a video goes: ``clips`` whole ones of ``frames_per_clip`` latent frames, and ``tail`` latent frames of
    one more."""

    clips: int
    tail: int
    frames_per_clip: int

    @classmethod
    def of(cls, frames: int, infer_frames: int) -> Extent:
        """Of ``frames`` video frames, a multiple of 4, in clips of ``infer_frames``."""
        clips, rest = divmod(frames, infer_frames)
        return cls(clips=clips, tail=rest // FRAMES_PER_LATENT, frames_per_clip=latent_frames_per_clip(infer_frames))

    @property
    def clips_begun(self) -> int:
        return self.clips + (self.tail > 0)

    @property
    def count(self) -> int:
        """Of all blocks."""
        return sum(1 for _ in self.blocks())

    def blocks(self, first: int = 0) -> Iterator[Block]:
        """All blocks in order, from number ``first`` on."""
        return itertools.islice(blocks_of(self.clips, self.frames_per_clip, tail=self.tail), first, None)

    def cuts(self, segment_frames: int, *, within_clips: bool, needed: int) -> Iterator[Block]:
        """Blocks that a new segment begins with, of a video cut into segments of at least ``segment_frames`` video
        frames: always the same of the same video. The last frame that is ``needed`` is in the last segment.
        ``within_clips``: a segment may end in the middle of a clip."""
        begin = 0
        for block in self.blocks():
            first = block.first_video_frame
            if first - begin >= segment_frames and first < needed and (within_clips or block.slot == 0):
                begin = first
                yield block


def blocks_of(
    clips: int, frames_per_clip: int, frames_per_block: int = FRAMES_PER_BLOCK, *, tail: int = 0
) -> Iterator[Block]:
    """All blocks in order; where a clip is no multiple of a block, its last block is shorter. Behind ``clips`` whole
    clips come the first ``tail`` latent frames of another one."""
    index = 0
    for clip, length in enumerate([frames_per_clip] * clips + [tail]):
        for slot, offset in enumerate(range(0, length, frames_per_block)):
            frames = min(frames_per_block, length - offset)
            yield Block(
                clip=clip,
                index=index,
                slot=slot,
                offset=offset,
                frames=frames,
                first_frame=clip * frames_per_clip + offset,
                last_of_clip=offset + frames == length,
            )
            index += 1


def block_at(index: int, infer_frames: int) -> Block:
    """Block number ``index`` of a video that goes on for at least a clip behind it."""
    return next(itertools.islice(blocks_of(index + 1, latent_frames_per_clip(infer_frames)), index, None))


def clip_noise(base_seed: int, clip: int, shape_CFhw: tuple[int, int, int, int]) -> Tensor:
    """Noise of one clip from a CPU generator, so that a seed means the same video on any device."""
    return torch.randn(shape_CFhw, generator=torch.Generator("cpu").manual_seed(base_seed + clip))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tick:
    """One pass over the layers: a step of each block that is under way, the oldest first. ``starts`` is the block
    that has its first step here; ``refresh`` says that the sink is made anew before it."""

    items: tuple[tuple[Block, int], ...]
    starts: Block | None
    refresh: bool

    def finished(self, steps: int) -> Block | None:
        """The block that has its last step here."""
        block, step = self.items[0]
        return block if step == steps - 1 else None


def ticks(blocks: Iterable[Block], steps: int, wave: int, *, cuts: Collection[int] = ()) -> Iterator[Tick]:
    """All steps of all blocks, with up to ``wave`` blocks under way; those whose numbers are in ``cuts`` start when all
    before them are finished.

    Step i of block b needs step i - 1 of block b, and what step i of block b - 1 left in its ring: so blocks can share
    a pass over the layers, each at least one step behind the one before it.

    Before the second clip the sink is refreshed from the first clip's first frame. Blocks of the first clip still
    read the old one, so the second clip starts when they are finished: a wave runs dry once a video.
    """
    coming = deque(blocks)
    flight: deque[list] = deque()
    refreshed = bool(coming) and coming[0].sees_generated_reference
    while coming or flight:
        starts, refresh = None, False
        if coming and _may_start(coming[0], flight, wave, refreshed=refreshed, cut=coming[0].index in cuts):
            starts = coming.popleft()
            refresh = starts.clip > 0 and not refreshed
            refreshed = refreshed or refresh
            flight.append([starts, 0])
        yield Tick(items=tuple((block, step) for block, step in flight), starts=starts, refresh=refresh)
        for entry in flight:
            entry[1] += 1
        if flight[0][1] == steps:
            flight.popleft()


def _may_start(block: Block, flight: deque[list], wave: int, *, refreshed: bool, cut: bool) -> bool:
    if cut or (block.clip > 0 and not refreshed):
        return not flight
    return len(flight) < wave
