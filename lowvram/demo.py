"""``lowvram demo``: the whole job on a tiny random model, for a machine without the published checkpoint.

The pictures are noise, because the weights are; what is shown is that every step runs, what it costs here, and how
far the int8 model is from the bf16 one.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from lowvram.infer import infer
from lowvram.media.samples import draw_portrait, synth_voice, write_wav
from lowvram.outputs import Outputs, check_folder
from lowvram.pipeline import FPS, AvatarPipeline, Request
from lowvram_kernels.errors import InputError
from lowvram_quantize.claims import writing
from lowvram_quantize.convert import convert
from lowvram_quantize.synthetic import MARKER, write_checkpoint
from lowvram_quantize.writer import disk_errors

log = logging.getLogger(__name__)

PRECISIONS = ("int8", "bf16")
TINY_LAYERS = 4
LORA_ALPHA = 2.0  # with the tiny LoRA's rank of 4 this is the published factor alpha / rank of 0.5


def prepare(folder: Path) -> Request:
    """Make the tiny checkpoint, a portrait and a voice in ``folder``; return what is to be made of them."""
    write_checkpoint(folder / "ckpt")
    portrait, voice = folder / "portrait.png", folder / "voice.wav"
    draw_portrait(256, 256).save(portrait)
    write_wav(voice, synth_voice(4.0), 16000)
    prompt = "A cheerful person with round glasses speaks to the camera"
    return Request(image=portrait, audio=voice, prompt=prompt, size="256*256", infer_frames=24)


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


def make_artifact(folder: Path, precision: str) -> Path:
    """The artifact of the tiny checkpoint that ``prepare`` made in ``folder``."""
    checkpoint, artifact = folder / "ckpt", folder / f"artifact-{precision}"
    lora = checkpoint / "LiveAvatar" / "liveavatar.safetensors"
    convert(checkpoint, artifact, precision=precision, lora=lora, lora_alpha=LORA_ALPHA, overwrite=True)
    return artifact


def run_demo(folder: Path, *, device: str = "auto", overwrite: bool = False) -> dict[str, dict[str, Any]]:
    """Convert the tiny checkpoint to int8 and bf16, infer both; return each one's report. What an earlier demo made in
    ``folder`` is replaced, and what somebody else did only with ``overwrite``.

    Raises:
        InputError, OutputError: the folder cannot be used, or the disk is full.
    """
    places = check_places(folder, overwrite=overwrite)
    with disk_errors(folder, 0):
        folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / "demo", "lowvram demo"):
        with disk_errors(folder / "demo", 0):
            request = prepare(folder)
        reports = {}
        for precision, outputs in places.items():
            pipeline = AvatarPipeline.from_artifact(make_artifact(folder, precision), device=device)
            reports[precision] = infer(pipeline, request, outputs)
    return reports


def check_places(folder: Path, *, overwrite: bool) -> dict[str, Outputs]:
    """Where each precision's run writes, looked at before anything is made.

    Raises:
        InputError: no folder, or files of these names that no demo has made and that may not be replaced.
        OutputError: nothing can be written there.
    """
    check_folder("--out-dir", folder, make=True)
    own = overwrite or (folder / "ckpt" / MARKER).is_file()
    places = {name: Outputs.in_folder(folder, name, "--out-dir", overwrite=True) for name in PRECISIONS}
    made = [folder / "ckpt", folder / "portrait.png", folder / "voice.wav"]
    made += [path for outputs in places.values() for path in outputs.named.values()]
    there = [path.name for path in made if os.path.lexists(path)]
    if there and not own:
        raise InputError(
            f"--out-dir is {folder}, which holds {', '.join(there[:3])} that no demo made; choose another folder, or "
            "replace them: --overwrite"
        )
    return places
