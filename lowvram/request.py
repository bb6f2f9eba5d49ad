"""Request: what to make, and the files of it read; cheap, so that bad input is told before any model loads."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowvram.media.audio import check_duration
from lowvram.media.image import portrait_tensor
from lowvram.media.pose import check_pose
from lowvram.media.several import joined, names_of, read_group, token_masks
from lowvram.media.sizes import output_size
from lowvram.media.sound import Sound
from lowvram.media.voice import Voice, load_voice
from lowvram.schedule import FRAMES_PER_BLOCK, latent_frames_per_clip
from lowvram_kernels.errors import ConfigError
from lowvram_models.constants import (
    CONTEXT_S,
    DROPPED_FIRST_FRAMES,
    FPS,
    FRAMES_PER_LATENT,
    PIXELS_PER_LATENT,
    SPEECH_RATE_HZ,
    WHOLE_FILE_S,
    WINDOW_S,
)

Tensor = torch.Tensor
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to make. ``size`` names an area "A*B"; the portrait decides the shape. Validated at construction.

    Several people speak where ``audio`` names several files, as "a.wav+b.wav": each is heard where its ``masks``
    picture is white, or in its part of the picture, from left to right; ``image`` may name a portrait of each likewise,
    which are put side by side. ``pose_video`` is followed, beside the voice.

    ``num_clip`` None means as many clips of ``infer_frames`` video frames as the audio fills, and what its last frames
    need of one more. ``online_decode`` False decodes a clip at a time instead of a block at a time. ``upscale``: a
    portrait that is smaller than ``size`` is scaled up to it. Of the audio file sound track ``audio_track`` is taken,
    counted from 1 (None: the first that is not silent), from ``audio_start`` on, in seconds, for ``audio_duration`` or
    to its end.
    """

    image: Path
    audio: Path
    prompt: str
    size: str = "704*384"
    infer_frames: int = 48
    num_clip: int | None = None
    sample_steps: int = 4
    base_seed: int = 420
    cond_rope_distance: int | str = 30
    online_decode: bool = True
    upscale: bool = False
    audio_track: int | None = None
    audio_start: float = 0.0
    audio_duration: float | None = None
    masks: tuple[Path, ...] = ()
    pose_video: Path | None = None

    def __post_init__(self) -> None:
        latent_frames_per_clip(self.infer_frames)
        if self.num_clip is not None and self.num_clip < 1:
            raise ConfigError(f"--num_clip is {self.num_clip}; expected 1 or more, or none for the whole audio")
        if not 1 <= self.sample_steps <= 1000:
            raise ConfigError(f"--sample_steps is {self.sample_steps}; expected 1 to 1000, 4 is what the model is for")
        if not 0 <= self.base_seed < 2**63 - 2**32:
            raise ConfigError(f"--base_seed is {self.base_seed}; expected a whole number from 0 to about 9e18")
        distance = self.cond_rope_distance
        if distance != "random" and not (isinstance(distance, int) and 0 <= distance <= 30):
            raise ConfigError(f"--cond-rope-distance is {distance!r}; expected 0 to 30, or random")
        if self.audio_track is not None and self.audio_track < 1:
            raise ConfigError(f"--audio-track is {self.audio_track}; expected 1, the first, or more")
        if not (math.isfinite(self.audio_start) and self.audio_start >= 0):
            raise ConfigError(f"--audio-start is {self.audio_start:g} s; expected 0 or more")
        duration = self.audio_duration
        if duration is not None and not (math.isfinite(duration) and duration > 0):
            raise ConfigError(f"--audio-duration is {duration:g} s; expected more than 0, or none for the rest")

    @property
    def portraits(self) -> tuple[Path, ...]:
        """The file of each portrait."""
        return names_of(self.image)

    @property
    def voices(self) -> tuple[Path, ...]:
        """The file of each voice."""
        return names_of(self.audio)

    @property
    def files(self) -> dict[str, Path]:
        """All that are read, by option."""
        several = {"--image": self.portraits, "--audio": self.voices, "--mask": self.masks}
        named = {
            option if len(paths) == 1 else f"{option}, {place}": path
            for option, paths in several.items()
            for place, path in enumerate(paths, 1)
        }
        return named | ({} if self.pose_video is None else {"--pose_video": self.pose_video})

    def absolute(self) -> Request:
        """The same for another working directory."""
        return dataclasses.replace(
            self,
            image=joined([path.absolute() for path in self.portraits]),
            audio=joined([path.absolute() for path in self.voices]),
            masks=tuple(path.absolute() for path in self.masks),
            pose_video=self.pose_video and self.pose_video.absolute(),
        )

    @property
    def may_be_long(self) -> bool:
        """Whether the voice may be one that is encoded window by window, as far as is known before it is read."""
        return self.audio_duration is None or self.audio_duration > WHOLE_FILE_S

    @property
    def voice_limit_s(self) -> float | None:
        """As much of the voice, in seconds, as is read: what ``num_clip`` clips need and what lies around it as
        context, but never less than what is encoded at once, so that a pause at the start is not taken for all of it;
        None for the whole voice."""
        if self.num_clip is None:
            return None
        return max(self.num_clip * self.infer_frames / FPS + CONTEXT_S, float(WHOLE_FILE_S))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """A request's files, read: portrait [3, H, W] in [-1, 1] and speech, mono float32 at 16 kHz; ``sound`` is the part
    of the audio file that the speech is, or begins: ``speech_goes_on`` where no more of it is needed. ``facts`` say for
    a report what the files were. Of several people ``others`` has the speech of those behind the first, as long as
    theirs, ``masks`` [people, tokens of a latent frame] says where each is heard, and ``sound`` is that of all."""

    request: Request
    portrait: Tensor
    speech: np.ndarray
    sound: Sound | tuple[Sound, ...] | None = None
    speech_goes_on: bool = False
    others: tuple[np.ndarray, ...] = ()
    masks: Tensor | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def speeches(self) -> tuple[np.ndarray, ...]:
        """Of everybody."""
        return self.speech, *self.others

    @property
    def latent_size(self) -> tuple[int, int]:
        height, width = self.portrait.shape[1:]
        return height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT

    @property
    def voice_on_host(self) -> bool:
        """Whether the audio encoder may stay on the host beside the video: the voice is encoded window by window, and
        the clips may need more of it than the first window, which is never shorter than half of the longest."""
        request, read_s = self.request, len(self.speech) / SPEECH_RATE_HZ
        clips_s = read_s if request.num_clip is None else request.num_clip * request.infer_frames / FPS
        return (self.speech_goes_on or read_s > WHOLE_FILE_S) and min(clips_s, read_s) > WINDOW_S / 2

    @property
    def voice_frames(self) -> int:
        """Video frames that begin before the speech ends."""
        return -(-len(self.speech) * FPS // SPEECH_RATE_HZ)


def read_inputs(request: Request, *, cut_said: bool = True) -> Inputs:
    """Read and check portrait and voice; cheap, so that bad input is told before any model loads. ``cut_said``: whether
    it is that ``num_clip`` ends the video before the voice.

    Raises:
        InputError: a file is missing, is not what it should be, or is too small, large, short or silent.
    """
    voices = _of_one_length([read_voice(request, path) for path in request.voices], request.voices)
    group = read_group(request.portraits, request.masks, len(voices))
    if request.pose_video is not None:
        check_pose(request.pose_video)
    portrait, voice = group.portrait, voices[0]
    height, width = _video_size(request, portrait.image.height, portrait.image.width)
    several = len(voices) > 1
    return Inputs(
        request=request,
        portrait=portrait_tensor(portrait.image, height, width),
        speech=voice.samples,
        sound=tuple(each.sound for each in voices) if several else voice.sound,
        speech_goes_on=all(each.goes_on for each in voices),
        others=tuple(each.samples for each in voices[1:]),
        masks=token_masks(group, height, width),
        facts={
            "portrait": portrait.facts,
            "voice": voice.facts,
            "voice_cut": _voice_cut(request, voice, said=cut_said),
            **({"other_voices": [each.facts for each in voices[1:]]} if several else {}),
        },
    )


def _of_one_length(voices: list[Voice], paths: tuple[Path, ...]) -> list[Voice]:
    """Several voices end with the shortest, as in the reference; what that leaves out is said."""
    shortest = min(len(voice.samples) for voice in voices)
    for voice, path in zip(voices, paths, strict=True):
        if (lost := len(voice.samples) - shortest) > SPEECH_RATE_HZ // FPS:
            log.warning(
                "voice %s is longer than the shortest: the last %.2f s of what was read are left out; give voices of "
                "one length, with silence where one does not speak",
                path,
                lost / SPEECH_RATE_HZ,
            )
    return [dataclasses.replace(voice, samples=voice.samples[:shortest]) for voice in voices]


def _voice_cut(request: Request, voice: Voice, *, said: bool) -> dict[str, float | None] | None:
    """Seconds of the voice that are kept and lost where ``num_clip`` ends the video before it, which is said; None
    where it does not. How many are lost is None where the file does not say how long it is."""
    if request.num_clip is None:
        return None
    frames = request.num_clip * request.infer_frames - DROPPED_FIRST_FRAMES
    kept_s = frames / FPS
    if len(voice.samples) * FPS <= frames * SPEECH_RATE_HZ:
        return None
    whole_s = voice.facts["seconds_in_all"]
    lost_s = None if whole_s is None else whole_s - kept_s
    log.log(
        logging.WARNING if said else logging.DEBUG,
        "--num_clip %d ends the video after %.2f s, and the voice is longer: %s of it are left out; without --num_clip "
        "the video goes on to its end",
        request.num_clip,
        kept_s,
        "all behind that" if lost_s is None else f"the last {lost_s:.2f} s",
    )
    return {"kept_s": kept_s, "lost_s": lost_s}


def read_voice(request: Request, path: Path | None = None) -> Voice:
    """Read and check a voice alone: that in ``path``, or the only one.

    Raises:
        InputError: as of ``read_inputs``.
    """
    voice = load_voice(
        path or request.audio,
        track=request.audio_track,
        start_s=request.audio_start,
        duration_s=request.audio_duration,
        limit_s=request.voice_limit_s,
    )
    check_duration(voice.samples, FRAMES_PER_BLOCK * FRAMES_PER_LATENT, FPS)
    return voice


def _video_size(request: Request, image_height: int, image_width: int) -> tuple[int, int]:
    """Height and width of the video; says where the portrait is too small for what was asked for."""
    height, width = output_size(request.size, image_height, image_width, upscale=request.upscale)
    if not request.upscale:
        full_height, full_width = output_size(request.size, image_height, image_width, upscale=True)
        if full_height * full_width > height * width:
            log.warning(
                "portrait %s of %dx%d px does not fill --size %s: the video is %dx%d px; --upscale makes it %dx%d",
                request.image,
                image_width,
                image_height,
                request.size,
                width,
                height,
                full_width,
                full_height,
            )
    return height, width
