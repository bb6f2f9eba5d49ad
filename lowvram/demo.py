"""``lowvram demo``: the whole job on a tiny random model, for a machine without the published checkpoint.

The pictures are noise, because the weights are; what is shown is that every step runs, what it costs here, and how
far the int8 model is from the bf16 one.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lowvram.infer import infer
from lowvram.media.samples import draw_portrait, synth_voice, write_wav
from lowvram.outputs import Outputs
from lowvram.pipeline import FPS, AvatarPipeline, Request
from lowvram_quantize.convert import convert
from lowvram_quantize.synthetic import write_checkpoint

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


def run_demo(folder: Path, *, device: str = "auto") -> dict[str, dict[str, Any]]:
    """Convert the tiny checkpoint to int8 and bf16, infer both; return each one's report."""
    folder.mkdir(parents=True, exist_ok=True)
    request = prepare(folder)
    reports = {}
    for precision in PRECISIONS:
        pipeline = AvatarPipeline.from_artifact(make_artifact(folder, precision), device=device)
        outputs = Outputs(
            video=folder / f"{precision}.mp4",
            dump_tensors=folder / f"{precision}.safetensors",
            report=folder / f"{precision}.json",
            overwrite=True,
        )
        reports[precision] = infer(pipeline, request, outputs)
    return reports
