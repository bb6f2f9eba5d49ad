"""``lowvram demo``: the whole job on a tiny model that draws talking faces, for a machine without the published one.

It shows that every step runs, what it costs here, how far the int8 model is from the bf16 one, and whether the mouth
follows the voice. With random weights instead, pictures are noise.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lowvram.compare.sources import open_source
from lowvram.compare.teacher_forcing import Forced, force
from lowvram.compare.trajectories import Trajectories
from lowvram.compare.vae_errors import VaeErrors, portrait_there_and_back, vae_errors
from lowvram.infer import Watching, infer
from lowvram.media.contact_sheet import contact_sheet, follows
from lowvram.media.image import fitted, load_portrait
from lowvram.media.samples import draw_portrait, synth_voice, write_wav
from lowvram.media.video import read_frames
from lowvram.media.voice import load_voice
from lowvram.outputs import Outputs, check_folder
from lowvram.pipeline import AvatarPipeline, Request
from lowvram.request import read_voice
from lowvram_kernels.errors import ConfigError, InputError
from lowvram_models.constants import FPS, SPEECH_RATE_HZ
from lowvram_quantize.claims import writing
from lowvram_quantize.convert import convert
from lowvram_quantize.places import same, within
from lowvram_quantize.synthetic import MARKER, write_checkpoint
from lowvram_quantize.trained import write_trained
from lowvram_quantize.writer import disk_errors

log = logging.getLogger("lowvram.plan")  # what is made of somebody's own files is said before it starts

PRECISIONS = ("int8", "bf16")
TINY_LAYERS = 4
VOICE_S = 3.7  # two clips, and nearly nothing behind them
OWN_VOICE_S = 20.0  # as much of somebody's own voice as is taken unless they say how much
SIDE_PX, RANDOM_SIDE_PX = 128, 256
TEACHER_FORCED_BLOCKS = 2  # a second of video
HEADROOM = 0.15  # of what is cut off a tall portrait as much lies above
PORTRAIT, VOICE, SHEET, PAGE = "portrait.png", "voice.wav", "contact-sheet.png", "compare.html"
LORA_ALPHA = 2.0  # with the tiny LoRA's rank of 4 this is the published factor alpha / rank of 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own:
    """Somebody's own portrait and voice, either of them or both; of the voice which part, as ``Request`` has it.

    Raises:
        ConfigError: a part of a voice that is not there.
    """

    image: Path | None = None
    audio: Path | None = None
    audio_track: int | None = None
    audio_start: float | None = None
    audio_duration: float | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in self.part.items() if value is not None]
        if given and self.audio is None:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(f"{names}: of which voice? expected --audio with it, or none of them for the demo's own")

    @property
    def part(self) -> dict[str, Any]:
        """Which part of the voice was asked for."""
        return {name: getattr(self, name) for name in ("audio_track", "audio_start", "audio_duration")}

    @property
    def files(self) -> dict[str, Path]:
        """What is read, by option."""
        return {f"--{name}": path for name in ("image", "audio") if (path := getattr(self, name)) is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What is to be made, of which portrait, and of which voice (mono at 16 kHz) where nobody brought one."""

    request: Request
    portrait: Image.Image
    voice: NDArray[np.float32] | None


def subject(folder: Path, own: Own, *, random: bool = False) -> Subject:
    """Read what is somebody's own, and draw and synthesize the rest; training saw neither. Nothing is written: the
    portrait is to lie in ``folder`` later, and so is a voice that nobody brought.

    Raises:
        InputError: as of ``infer``: a file is missing, is not what it should be, or is too small, large, short, silent.
    """
    side = RANDOM_SIDE_PX if random else SIDE_PX
    portrait = draw_portrait(side, side) if own.image is None else _own_portrait(own.image, side, random=random)
    more: dict[str, Any] = {"prompt": "A person speaks to the camera"}
    if random:
        more = {"prompt": "A cheerful person with round glasses speaks to the camera", "infer_frames": 24}
    request = Request(
        image=folder / PORTRAIT,
        audio=own.audio or folder / VOICE,
        size=f"{side}*{side}",
        **more | {name: value for name, value in own.part.items() if value is not None},
    )
    if own.audio is None:
        return Subject(request=request, portrait=portrait, voice=synth_voice(VOICE_S))
    return Subject(request=_with_own_voice(request), portrait=portrait, voice=None)


def _own_portrait(path: Path, side: int, *, random: bool) -> Image.Image:
    """A square of it, the only shape that the tiny model was made for: of a wide picture the middle, of a tall one what
    lies near its top, where people have their faces."""
    image = load_portrait(path)
    cut = min(image.size)
    left, top = (image.width - cut) // 2, round((image.height - cut) * HEADROOM)
    log.info(
        "portrait %s, %dx%d px: %dx%d px of it, %d from the left and %d from the top, become %dx%d",
        *(path, *image.size, cut, cut, left, top, side, side),
    )
    if not random:
        log.info(
            "the tiny model knows drawn faces only: a photograph will look like a drawn face, and its mouth moves "
            "where drawn ones have theirs; crop it so that the face is in the middle and half as high as the picture"
        )
    return fitted(image.crop((left, top, left + cut, top + cut)), side, side)


def _with_own_voice(request: Request) -> Request:
    """The request for as much of the voice as the demo takes of it, which is there and can be heard."""
    if request.audio_duration is None:
        track, start = request.audio_track, request.audio_start
        if load_voice(request.audio, track=track, start_s=start, limit_s=OWN_VOICE_S).goes_on:
            log.info("audio %s: %g s of it are taken; --audio-duration takes more", request.audio, OWN_VOICE_S)
            request = dataclasses.replace(request, audio_duration=OWN_VOICE_S)
    read_voice(request)
    return request


def prepare(folder: Path, *, random: bool = False, given: Subject | None = None) -> Request:
    """Make the tiny checkpoint, trained or ``random``, in ``folder``, and lay portrait and voice beside it; return what
    is to be made of them. ``given``: of ``subject``, None for what is drawn and synthesized."""
    given = given or subject(folder, Own(), random=random)
    (write_checkpoint if random else write_trained)(folder / "ckpt")
    if given.voice is not None:
        write_wav(folder / VOICE, given.voice, SPEECH_RATE_HZ)
    given.portrait.save(folder / PORTRAIT)
    return given.request


def tiny_model(folder: Path, *, steps: int, clips: int) -> tuple[Path, Request]:
    """Make an int8 artifact of ``TINY_LAYERS`` layers in ``folder``; (it, a video of the smallest size to make)."""
    write_checkpoint(folder / "ckpt", num_layers=TINY_LAYERS)
    artifact = convert(folder / "ckpt", folder / "int8", precision="int8")
    portrait, voice = folder / "portrait.png", folder / "voice.wav"
    draw_portrait(128, 128).save(portrait)
    frames = 16
    write_wav(voice, synth_voice(clips * frames / FPS + 0.1), SPEECH_RATE_HZ)
    request = Request(
        image=portrait,
        audio=voice,
        prompt="A person speaks",
        size="128*128",
        infer_frames=frames,
        num_clip=clips,
        sample_steps=steps,
    )
    return artifact, request


def make_artifact(folder: Path, precision: str, *, random: bool = False) -> Path:
    """The artifact of the tiny checkpoint that ``prepare`` made in ``folder``."""
    checkpoint, artifact = folder / "ckpt", folder / f"artifact-{precision}"
    lora, alpha = checkpoint / "LiveAvatar" / "liveavatar.safetensors", LORA_ALPHA if random else None
    convert(checkpoint, artifact, precision=precision, lora=lora, lora_alpha=alpha, overwrite=True)
    return artifact


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Each run's report, the int8 model's teacher-forced steps and its VAE alone; of trained weights the ``sheet``,
    and by precision how the mouth correlates with the voice."""

    reports: dict[str, dict[str, Any]]
    forced: Forced
    vae: VaeErrors | None
    sheet: Path | None = None
    follows: dict[str, float] = dataclasses.field(default_factory=dict)


def run_demo(
    folder: Path, *, own: Own | None = None, device: str = "auto", overwrite: bool = False, random: bool = False
) -> Demo:
    """Convert the tiny checkpoint to int8 and bf16, infer both, int8 teacher-forced over a second of bf16 too, and lay
    their frames side by side on a sheet. What an earlier demo made in ``folder`` is replaced, and what somebody else
    did only with ``overwrite``.

    Raises:
        InputError, OutputError: a file of ``own`` or the folder cannot be used, or the disk is full.
    """
    own = own or Own()
    places = check_places(folder, own, overwrite=overwrite)
    given = subject(folder, own, random=random)
    with disk_errors(folder, 0):
        folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / "demo", "lowvram demo"):
        with disk_errors(folder / "demo", 0):
            for name in (SHEET, PAGE, PORTRAIT, VOICE):  # an earlier demo's would stand beside other videos
                (folder / name).unlink(missing_ok=True)
            request = prepare(folder, random=random, given=given)
        made = _made(folder, request, places, device=device, random=random)
        return made if random else _shown(folder, made, request, places)


def _made(folder: Path, request: Request, places: dict[str, Outputs], *, device: str, random: bool) -> Demo:
    int8, bf16 = (
        AvatarPipeline.from_artifact(make_artifact(folder, precision, random=random), device=device)
        for precision in PRECISIONS
    )
    trajectories = Trajectories()
    watching = Watching(begun=trajectories.watcher(limit=TEACHER_FORCED_BLOCKS).begun)
    reports = {
        "bf16": infer(bf16, request, places["bf16"], watching=watching),
        "int8": infer(int8, request, places["int8"]),
    }
    portrait = portrait_there_and_back(bf16, request)
    vae = vae_errors(int8, open_source(folder / "bf16.json"), request, portrait)
    return Demo(reports=reports, forced=force(int8, request, trajectories), vae=vae)


def _shown(folder: Path, made: Demo, request: Request, places: dict[str, Outputs]) -> Demo:
    voice = read_voice(request).samples
    videos = {name: np.stack(list(read_frames(outputs.video))) for name, outputs in places.items()}
    sheet = folder / SHEET
    with disk_errors(sheet, 0):
        contact_sheet(load_portrait(request.image), videos, voice, FPS).save(sheet)
    found = {name: follows(frames, voice, FPS) for name, frames in videos.items()}
    return dataclasses.replace(made, sheet=sheet, follows=found)


def check_places(folder: Path, own: Own, *, overwrite: bool) -> dict[str, Outputs]:
    """Where each precision's run writes, looked at before anything is made.

    Raises:
        InputError: no folder, or files of these names that no demo has made and that may not be replaced, or that are
            somebody's own input.
        OutputError: nothing can be written there.
    """
    check_folder("--out-dir", folder, make=True)
    replaceable = overwrite or (folder / "ckpt" / MARKER).is_file()
    places = {name: Outputs.in_folder(folder, name, "--out-dir", overwrite=True) for name in PRECISIONS}
    made = [folder / "ckpt", *(folder / name for name in (PORTRAIT, VOICE, SHEET, PAGE))]
    made += [path for outputs in places.values() for path in outputs.named.values()]
    replaced = made + [folder / f"artifact-{name}" for name in PRECISIONS]
    replaced += [path for outputs in places.values() for path in outputs.unfinished.values()]
    for option, path in own.files.items():
        for place in replaced:
            if same(path, place) or within(path, place):
                raise InputError(
                    f"{option} is {path}, and the demo replaces {place.name} in --out-dir {folder}; choose another "
                    "folder, or copy the file to another place"
                )
    there = [path.name for path in made if os.path.lexists(path)]
    if there and not replaceable:
        raise InputError(
            f"--out-dir is {folder}, which holds {', '.join(there[:3])} that no demo made; choose another folder, or "
            "replace them: --overwrite"
        )
    return places
