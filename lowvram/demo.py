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

from lowvram.infer import infer
from lowvram.media.contact_sheet import contact_sheet, follows
from lowvram.media.image import load_portrait
from lowvram.media.samples import draw_portrait, synth_voice, write_wav
from lowvram.media.video import read_frames
from lowvram.media.voice import load_voice
from lowvram.outputs import Outputs, check_folder
from lowvram.pipeline import FPS, AvatarPipeline, Request
from lowvram_kernels.errors import InputError
from lowvram_quantize.claims import writing
from lowvram_quantize.convert import convert
from lowvram_quantize.synthetic import MARKER, write_checkpoint
from lowvram_quantize.trained import write_trained
from lowvram_quantize.writer import disk_errors

log = logging.getLogger(__name__)

PRECISIONS = ("int8", "bf16")
TINY_LAYERS = 4
VOICE_S = 3.7  # two clips, and nearly nothing behind them
SHEET = "contact-sheet.png"
LORA_ALPHA = 2.0  # with the tiny LoRA's rank of 4 this is the published factor alpha / rank of 0.5


def prepare(folder: Path, *, random: bool = False) -> Request:
    """Make the tiny checkpoint, trained or ``random``, a portrait and a voice in ``folder``; return what is to be made
    of them. Training saw neither this face nor this voice."""
    portrait, voice = folder / "portrait.png", folder / "voice.wav"
    write_wav(voice, synth_voice(VOICE_S), 16000)
    if random:
        write_checkpoint(folder / "ckpt")
        draw_portrait(256, 256).save(portrait)
        prompt = "A cheerful person with round glasses speaks to the camera"
        return Request(image=portrait, audio=voice, prompt=prompt, size="256*256", infer_frames=24)
    write_trained(folder / "ckpt")
    draw_portrait(128, 128).save(portrait)
    return Request(image=portrait, audio=voice, prompt="A person speaks to the camera", size="128*128")


def tiny_model(folder: Path, *, steps: int, clips: int) -> tuple[Path, Request]:
    """Make an int8 artifact of ``TINY_LAYERS`` layers in ``folder``; (it, a video of the smallest size to make)."""
    write_checkpoint(folder / "ckpt", num_layers=TINY_LAYERS)
    artifact = convert(folder / "ckpt", folder / "int8", precision="int8")
    portrait, voice = folder / "portrait.png", folder / "voice.wav"
    draw_portrait(128, 128).save(portrait)
    frames = 16
    write_wav(voice, synth_voice(clips * frames / FPS + 0.1), 16000)
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
    """Each run's report; of trained weights the ``sheet``, and by precision how the mouth correlates with the voice."""

    reports: dict[str, dict[str, Any]]
    sheet: Path | None = None
    follows: dict[str, float] = dataclasses.field(default_factory=dict)


def run_demo(folder: Path, *, device: str = "auto", overwrite: bool = False, random: bool = False) -> Demo:
    """Convert the tiny checkpoint to int8 and bf16, infer both, and lay their frames side by side on a sheet. What an
    earlier demo made in ``folder`` is replaced, and what somebody else did only with ``overwrite``.

    Raises:
        InputError, OutputError: the folder cannot be used, or the disk is full.
    """
    places = check_places(folder, overwrite=overwrite)
    with disk_errors(folder, 0):
        folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / "demo", "lowvram demo"):
        with disk_errors(folder / "demo", 0):
            (folder / SHEET).unlink(missing_ok=True)  # an earlier demo's would stand beside other videos
            request = prepare(folder, random=random)
        reports = {}
        for precision, outputs in places.items():
            pipeline = AvatarPipeline.from_artifact(make_artifact(folder, precision, random=random), device=device)
            reports[precision] = infer(pipeline, request, outputs)
        return Demo(reports=reports) if random else _shown(folder, reports, request, places)


def _shown(folder: Path, reports: dict[str, Any], request: Request, places: dict[str, Outputs]) -> Demo:
    voice = load_voice(request.audio).samples
    videos = {name: np.stack(list(read_frames(outputs.video))) for name, outputs in places.items()}
    sheet = folder / SHEET
    with disk_errors(sheet, 0):
        contact_sheet(load_portrait(request.image), videos, voice, FPS).save(sheet)
    found = {name: follows(frames, voice, FPS) for name, frames in videos.items()}
    return Demo(reports=reports, sheet=sheet, follows=found)


def check_places(folder: Path, *, overwrite: bool) -> dict[str, Outputs]:
    """Where each precision's run writes, looked at before anything is made.

    Raises:
        InputError: no folder, or files of these names that no demo has made and that may not be replaced.
        OutputError: nothing can be written there.
    """
    check_folder("--out-dir", folder, make=True)
    own = overwrite or (folder / "ckpt" / MARKER).is_file()
    places = {name: Outputs.in_folder(folder, name, "--out-dir", overwrite=True) for name in PRECISIONS}
    made = [folder / "ckpt", folder / "portrait.png", folder / "voice.wav", folder / SHEET]
    made += [path for outputs in places.values() for path in outputs.named.values()]
    there = [path.name for path in made if os.path.lexists(path)]
    if there and not own:
        raise InputError(
            f"--out-dir is {folder}, which holds {', '.join(there[:3])} that no demo made; choose another folder, or "
            "replace them: --overwrite"
        )
    return places
