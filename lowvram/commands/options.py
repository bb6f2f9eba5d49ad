"""Options of single commands; those that several share are in ``lowvram.commands.shared_options``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lowvram.byte_sizes import parse_bytes
from lowvram.commands.shared_options import FILE, declared, rank_options, request_options, switch

RINGS = click.Choice(["auto", "int8", "bf16"])
PRECISIONS = click.Choice(["int8", "fp8", "bf16", "fp32"])
OR_AUTO = click.Choice([*PRECISIONS.choices, "auto"])
Option = Callable[..., Any]


class Rotation(click.Choice):
    """How many channels: as ``convert`` of the library takes it, False for none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | bool:
        chosen = super().convert(str(value), param, ctx)
        return False if chosen == "none" else int(chosen)


class Bytes(click.ParamType):
    """An amount with a unit."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return value if isinstance(value, int) else parse_bytes(value, param.opts[0] if param else "")


def convert_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What ``convert`` reads, what it makes of it, and where."""
    options: list[Option] = [
        *_read(),
        click.option("--out", type=FILE, required=True, help="Folder to make."),
        *_stored(),
        click.option("--overwrite", is_flag=True, help="Replace a finished artifact in --out."),
        *_calibrated(),
        click.option("--json", "as_json", is_flag=True, help="Print what inspect --json does, instead of the folder."),
    ]
    return declared(options, command)


def _read() -> list[Option]:
    """Checkpoint and LoRAs."""
    return [
        click.option(
            "--ckpt-dir", type=FILE, help="The published Wan2.2-S2V-14B folder, its parent, or repackaged files."
        ),
        click.option(
            "--dit-file", type=FILE, help="The DiT: safetensors, also scaled fp8, or GGUF; instead of --ckpt-dir's."
        ),
        click.option("--vae-file", type=FILE, help="The VAE, likewise."),
        click.option("--text-encoder-file", type=FILE, help="The UMT5-XXL encoder, likewise."),
        click.option("--audio-encoder-dir", type=FILE, help="wav2vec2's folder, likewise."),
        click.option("--tokenizer-dir", type=FILE, help="The folder with UMT5's tokenizer.json, likewise."),
        click.option(
            "--lora",
            "--lora-path",
            "--lora-path-dmd",
            "lora",
            multiple=True,
            metavar="FILE[:WEIGHT]",
            help="Merged in float32 before quantizing; repeatable.",
        ),
        click.option("--lora-alpha", type=float, help="For a LoRA that states none; default: 64, LiveAvatar's."),
    ]


def _stored() -> list[Option]:
    """In what the components are stored, and what is done to the DiT's int8 before."""
    return [
        click.option(
            "--precision",
            type=OR_AUTO,
            default="int8",
            help="Of every component not set apart below. auto: each of the DiT's layers is int8, fp8 or bf16, by what "
            "it does against the error; the others int8.",
        ),
        click.option("--dit", type=OR_AUTO, help="Precision of the DiT alone."),
        click.option("--vae", type=PRECISIONS, help="Precision of the VAE alone."),
        click.option(
            "--text-encoder", type=click.Choice(["int8", "fp8", "nf4", "bf16", "fp32"]), help="Of the text encoder."
        ),
        click.option(
            "--rotate",
            type=Rotation(["none", "16", "32", "64", "128", "256"]),
            is_flag=False,
            flag_value="256",
            help="The most inputs of the DiT's int8 Linears to rotate together against outliers; default: 256, and 16 "
            "in Linears of fewer.",
        ),
        click.option(
            "--smooth/--no-smooth",
            default=None,
            help="Give input channels of the DiT's int8 Linears factors, which even out its weights' columns against "
            "outliers; default: where they are rotated.",
        ),
        click.option(
            "--target-bytes",
            type=Bytes(),
            help="With auto: what the DiT's file, dit.safetensors, is to take, as 20GB or 18.5GiB; it takes up to 1 % "
            "less. It is what lies on a card during a video, or is streamed to it.",
        ),
        click.option(
            "--max-error",
            type=float,
            help="With auto, instead: the fewest bytes whose predicted relative error of the DiT's output is at most "
            "this, as 0.02.",
        ),
        click.option(
            "--activations",
            type=FILE,
            help="An artifact that was made with --calibrate: how large its Linears' inputs were decides those factors "
            "too.",
        ),
        click.option(
            "--measure-on",
            type=FILE,
            help="With auto: an artifact of the same source in bf16, which is run on a short video to measure what "
            "int8 costs in each layer; otherwise a table says so.",
        ),
    ]


def _calibrated() -> list[Option]:
    """The short video that an artifact is run on."""
    return [
        click.option(
            "--calibrate",
            is_flag=True,
            help="Run the artifact on a short video and note in its manifest what each layer's output loses; of a "
            "finished one in --out, which stays as it is, too.",
        ),
        click.option(
            "--calibrate-image",
            type=FILE,
            help="With --calibrate or --measure-on: your portrait, instead of a drawn one.",
        ),
        click.option("--calibrate-audio", type=FILE, help="With either: your voice, likewise."),
        click.option("--calibrate-prompt", help="With either: what is to be seen, or @FILE that says it."),
        click.option("--calibrate-size", help="With either: the area of the video; 256*256 if it is not given."),
        click.option("--device", help="With either: auto, which is the default, cpu, cuda or cuda:N."),
        click.option("--vram-budget", help="With either: GPU memory to stay within, as 22.15GiB."),
    ]


def demo_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where the demo writes, and what somebody brings to it."""
    options: list[Callable[..., Any]] = [
        click.option(
            "--out-dir", type=FILE, default=Path("demo-out"), help="Folder for the tiny model and the videos."
        ),
        click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N."),
        click.option("--overwrite", is_flag=True, help="Replace files in --out-dir that no demo has made."),
        click.option("--random", is_flag=True, help="Random weights instead of trained ones: pictures are noise."),
        click.option("--image", type=FILE, help="Your own portrait; a photograph will look like a drawn face."),
        click.option("--audio", type=FILE, help="Your own voice, of which 20 seconds are taken."),
        click.option("--audio-track", type=int, help="With --audio: the sound track, as of infer."),
        click.option("--audio-start", help="With --audio: where to begin, seconds or mm:ss."),
        click.option("--audio-duration", help="With --audio: how much of it to take, likewise."),
    ]
    return declared(options, command)


def compare_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What ``compare`` compares, or runs first."""
    options: list[Callable[..., Any]] = [
        click.option("--model", type=FILE, help="Artifact to run, instead of naming A."),
        click.option("--baseline", type=FILE, help="Artifact to run as the baseline, instead of naming B."),
        click.option("--reference", type=FILE, help="What compare record made of a baseline, instead of running it."),
        click.option(
            "--teacher-forced-blocks",
            type=int,
            help="Blocks whose single steps are compared too; default: 8, with --reference all.",
        ),
        click.option("--image", type=FILE, help="Portrait, with --model."),
        click.option("--audio", type=FILE, help="Voice, with --model."),
        click.option("--prompt", help="What is to be seen, with --model."),
        click.option("--baseline-kv", type=RINGS, help="Rings of the baseline, if not --kv."),
        click.option(
            "--out-dir",
            type=FILE,
            help="Folder that keeps what --model and --baseline make: videos, dumps, reports; with --reference the "
            "video and report of --model.",
        ),
        request_options,
        click.option(
            "--overwrite", is_flag=True, help="Replace what an earlier comparison left in --out-dir and --html."
        ),
        click.option("-q", "--quiet", is_flag=True, help="No progress bars, with --model."),
        click.option("--json", "as_json", is_flag=True, help="The result as JSON."),
        click.option(
            "--fail-under", multiple=True, metavar="METRIC=VALUE", help="Exit with 1 when missed, as psnr=30."
        ),
        click.option(
            "--html", type=FILE, help="Write a page with both videos side by side, their difference and all figures."
        ),
    ]
    return declared(options, command)


def record_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What ``compare record`` runs, and where it keeps it."""
    options: list[Callable[..., Any]] = [
        click.option(
            "--model", type=FILE, required=True, help="Artifact to run: the baseline, as precise as there is."
        ),
        click.option("--image", type=FILE, required=True, help="Portrait; a copy is kept."),
        click.option("--audio", type=FILE, required=True, help="Voice; a copy is kept."),
        click.option("--prompt", required=True, help="What is to be seen; or @FILE."),
        click.option("--out", type=FILE, required=True, help="Folder to make."),
        request_options,
        click.option("--overwrite", is_flag=True, help="Replace a reference of that name."),
        click.option("-q", "--quiet", is_flag=True, help="No progress bar."),
    ]
    return declared(options, command)


def infer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What ``infer`` reads and writes, with what it shares with other commands."""
    first: list[Callable[..., Any]] = [
        click.option("--model", type=FILE, required=True, help="Artifact that convert wrote."),
        click.option(
            "--image", type=FILE, required=True, help="Portrait: any usual kind of picture; a.png+b.png: side by side."
        ),
        click.option(
            "--audio",
            type=FILE,
            required=True,
            help="Voice: any file with sound in it; a.wav+b.wav: of several people, from left to right.",
        ),
        click.option(
            "--mask",
            "masks",
            type=FILE,
            multiple=True,
            help="Of several people: a picture as large as the portrait, white where the next of them is; one of each.",
        ),
        click.option("--pose-video", type=FILE, help="Video of a moving skeleton to follow."),
        click.option("--prompt", required=True, help="What is to be seen, or @FILE that says it."),
        click.option("--out", "--save-file", "out", type=FILE, help="MP4 to write."),
        click.option("--save-dir", type=FILE, help="Folder to write to instead, under a name made of what goes in."),
    ]
    last: list[Callable[..., Any]] = [
        click.option("--dump-tensors", type=FILE, help="Write conditions, latents and frames as safetensors."),
        click.option("--report", type=FILE, help="Write settings, timings, memory and kernels as JSON."),
        click.option("--memory-log", type=FILE, help="Write memory over time as CSV; lowvram report draws it."),
        click.option(
            "--segment-minutes", type=float, help="Write a long video in segments, each with a state to go on from."
        ),
        click.option("--resume", is_flag=True, help="Go on with such a video from its last state."),
        click.option("--overwrite", is_flag=True, help="Replace files of these names."),
        click.option("-q", "--quiet", is_flag=True, help="No progress bar."),
    ]
    return declared(first, request_options(declared(last, rank_options(command))))


def plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What ``plan`` plans for: a model, a machine, and what is to be made."""
    options: list[Callable[..., Any]] = [
        click.option("--model", type=FILE, help="Artifact to plan for."),
        click.option(
            "--preset", type=click.Choice(["14b", "tiny"]), help="Published shapes, without an artifact; default: 14b."
        ),
        click.option("--precision", type=PRECISIONS, help="Of the preset's weights; default: int8."),
        click.option(
            "--vram-budget",
            "--vram",
            "vram_budget",
            help="GPU memory to stay within, of each card: 22.15GiB, 16g, 24GB; default: what it has for us.",
        ),
        click.option(
            "--ram-budget",
            "--ram",
            "ram_budget",
            help="Host memory to stay within, likewise; default: all of it, or 64GiB for a card elsewhere.",
        ),
        click.option(
            "--size", default="704*384", help="Exactly these sides: a portrait makes the same area or less of it."
        ),
        click.option("--infer-frames", type=int, default=48, help="Video frames a clip: a multiple of 4 from 12 on."),
        click.option("--sample-steps", type=int, default=4, help="Denoising steps a block."),
        click.option("--audio-duration", help="How long the voice is: seconds or mm:ss; default: any length."),
        click.option(
            "--gpu",
            default="auto",
            help='As rtx4090 or "RTX 4060 Ti 16GB"; list for all, custom:vram=24GiB,like=rtx3090,... for others; '
            "auto measures the card at hand once.",
        ),
        click.option(
            "--gpus", type=int, help="So many GPUs of one machine share the work; shows each rank and all layouts."
        ),
        click.option("--num-gpus-dit", type=int, help="With --gpus: how many of them denoise."),
        click.option(
            "--ulysses-size", type=int, help="With --gpus: how many share the tokens of a step, and its heads."
        ),
        switch("--enable-vae-parallel", None, "With --gpus: one more encodes and decodes; default: from 4 GPUs on."),
        click.option("--kv", type=click.Choice(["auto", "int8", "bf16"]), default="auto", help="KV rings and sink."),
        click.option("--wave", default="auto", help="Steps that share a pass over the layers: auto, 1 to the steps."),
        click.option(
            "--dtype", default="auto", help="Of what is not 8-bit: auto (bfloat16 on a GPU), float32 or bfloat16."
        ),
        switch("--offload-model", False, "Keep all of the DiT's layers on the host."),
        switch("--offload-kv-cache", False, "Keep all KV rings in host memory."),
        switch("--t5-cpu", False, "Encode the prompt on the host."),
        switch("--resident", False, "Weights stay for the next video, as of serve and batch."),
        click.option(
            "--dry-run", "dry", is_flag=True, help="Also run the plan, on a simulated GPU; takes about 20 s a rank."
        ),
        click.option("--json", "as_json", is_flag=True, help="Everything, as JSON; also of a plan that does not fit."),
    ]
    return declared(options, command)
