"""Settings of a job as a client writes them, and what they become with its files: a request, checked whole."""

from __future__ import annotations

import json
import math
import re
import secrets
from pathlib import Path
from typing import Any, Literal

import pydantic

from lowvram.media.audio import check_duration
from lowvram.media.image import fitted
from lowvram.media.pose import check_pose
from lowvram.media.several import joined, read_group
from lowvram.media.sizes import output_size
from lowvram.media.voice import load_voice
from lowvram.request import Request
from lowvram.schedule import FRAMES_PER_BLOCK
from lowvram.serve.errors import Refused
from lowvram.serve.limits import MAX_INFER_FRAMES, MAX_PROMPT, Limits
from lowvram.serve.store import FILES, Place
from lowvram_kernels.errors import LowvramError
from lowvram_models.constants import FPS, FRAMES_PER_LATENT, SPEECH_RATE_HZ, WHOLE_FILE_S

_THUMBNAIL_PX = 160
_BEHIND_S = 1.0
"""How much more of a voice is looked for than may be there."""


class Settings(pydantic.BaseModel):
    """What to make, with the names and meanings of ``lowvram infer``'s options. ``base_seed`` -1 draws one."""

    model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = pydantic.Field(min_length=1, max_length=MAX_PROMPT)
    size: str = pydantic.Field(default="704*384", max_length=20)
    infer_frames: int = pydantic.Field(default=48, le=MAX_INFER_FRAMES)
    num_clip: int | None = None
    sample_steps: int = pydantic.Field(default=4, le=100)
    base_seed: int = 420
    cond_rope_distance: int | Literal["random"] = 30
    online_decode: bool = True
    upscale: bool = False
    audio_track: int | None = None
    audio_start: float = 0.0
    audio_duration: float | None = None

    @pydantic.field_validator("prompt")
    @classmethod
    def _of_text(cls, prompt: str) -> str:
        if not prompt.strip() or "\0" in prompt:
            raise ValueError("expected some text")
        return prompt.strip()

    def request(self, place: Place) -> Request:
        """Raises: LowvramError: a value that cannot be used."""
        return Request(
            image=joined(place.sent("image", "image2") or (place.image,)),
            audio=joined(place.sent("audio", "audio2") or (place.audio,)),
            masks=place.sent("mask", "mask2"),
            pose_video=next(iter(place.sent("pose_video")), None),
            **self.model_dump(),
        )


def parse_settings(fields: dict[str, str]) -> Settings:
    """Settings from a form: one field ``settings`` with an object in JSON, or a field each; "" is as if it were not
    there.

    Raises:
        Refused (422): a field that is not known, or of another kind; the prompt is missing.
    """
    given: Any = {name: value for name, value in fields.items() if value != "" and name != "settings"}
    if "settings" in fields:
        if given:
            raise Refused(422, f"settings came as JSON, and {', '.join(sorted(given))} beside it; expected one of both")
        try:
            given = json.loads(fields["settings"])
        except (ValueError, RecursionError) as error:
            raise Refused(422, f'settings is no JSON ({error}); expected an object, as {{"prompt": "..."}}') from error
        if not isinstance(given, dict):
            raise Refused(422, 'settings is no object; expected one, as {"prompt": "..."}')
    try:
        return Settings.model_validate(given)
    except pydantic.ValidationError as error:
        raise Refused(422, _said(error)) from error


def _said(error: pydantic.ValidationError) -> str:
    """The first of what is wrong, in a line."""
    first = error.errors(include_url=False, include_context=False)[0]
    name, wrong = str(first["loc"][0]) if first["loc"] else "settings", first["msg"]
    if first["type"] == "missing":
        return f"{name} is missing; expected what is to be made, as prompt=..."
    if first["type"] == "extra_forbidden":
        return f"{name[:40]!r} is no setting; expected one of {', '.join(Settings.model_fields)}"
    return f"{name} is {str(first['input'])[:60]!r}: {wrong[:1].lower()}{wrong[1:]}"


def checked(settings: Settings, place: Place, limits: Limits) -> Settings:
    """Read the files that lie in ``place`` as far as to know that a video can be made of them, and draw the thumbnail;
    takes seconds. Returns the settings, with a seed.

    Raises:
        Refused (422): a value or a file that cannot be used, as the command line says it; (413) a voice for a longer
            video than may be made.
    """
    if settings.base_seed == -1:
        settings = settings.model_copy(update={"base_seed": secrets.randbelow(2**31)})
    try:
        request = settings.request(place)
        portrait = read_group(request.portraits, request.masks, len(request.voices)).portrait.image
        output_size(request.size, portrait.height, portrait.width, upscale=request.upscale)
        for path in request.voices:
            _check_voice(request, path, limits)
        if request.pose_video is not None:
            check_pose(request.pose_video)
    except Refused:
        raise
    except LowvramError as error:
        raise Refused(422, without_paths(str(error), place)) from error
    scale = _THUMBNAIL_PX / max(portrait.size)
    height, width = (max(1, round(side * scale)) for side in (portrait.height, portrait.width))
    fitted(portrait, height, width).save(place.thumbnail, format="JPEG", quality=85)
    return settings


def _check_voice(request: Request, path: Path, limits: Limits) -> None:
    """No more is read than tells whether it is too long."""
    most_s = max(limits.seconds + _BEHIND_S, float(WHOLE_FILE_S))
    voice = load_voice(
        path,
        track=request.audio_track,
        start_s=request.audio_start,
        duration_s=request.audio_duration,
        limit_s=most_s,
    )
    check_duration(voice.samples, FRAMES_PER_BLOCK * FRAMES_PER_LATENT, FPS)
    there_s = len(voice.samples) / SPEECH_RATE_HZ
    clips_s = math.inf if request.num_clip is None else request.num_clip * request.infer_frames / FPS
    if min(there_s, clips_s) > limits.seconds:
        raise Refused(
            413,
            f"{path.name} lasts longer than {limits.seconds:g} s, the most that is made here; expected a shorter one, "
            f"or audio_duration={limits.seconds:g}, which takes its beginning",
        )


def without_paths(text: str, place: Place) -> str:
    """What an error says, with files called as in the form: where they lie is nobody's business."""
    for name in sorted(FILES, reverse=True):  # "image2" before "image", which it begins with
        where = re.escape(str(place.file(name)))
        text = re.sub(rf"((image|audio|portrait|voice|mask|pose video) )?{where}", name, text)
    return text.replace(f"{place.folder}/", "").replace(str(place.folder), "its folder")
