"""Options that several commands share, and what they become: a request, memory options, ranks, a pipeline.

Some values stand for others: a prompt that lies in a file, a seed to be drawn, a folder to write into.

Libraries are imported in the functions that need them: ``--help`` does not wait for them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowvram.byte_sizes import parse_bytes
from lowvram_kernels.errors import ConfigError, InputError

if TYPE_CHECKING:
    from lowvram.request import Request

log = logging.getLogger("lowvram.plan")

DRAWN = -1
"""The ``--base_seed`` that stands for any, as in the reference."""
# Far beyond the tokens that the model reads: what is longer is no prompt.
_MOST_BYTES = 2**16
_LIKE_A_FILE = re.compile(r"\S+\.(txt|md|prompt|text)", re.IGNORECASE)
_PART_LENGTH = 48
_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+", re.ASCII)


def prompt_file(text: str) -> Path | None:
    """The file that ``--prompt`` names, as ``@FILE`` or as the path of one that is there; None of a prompt itself.

    Raises:
        InputError: a file is meant that is not there.
    """
    marked, path = text.startswith("@"), Path(text.removeprefix("@"))
    if _is_file(path):
        return path
    if marked:
        raise InputError(f"--prompt is {text}, and {path} is no file; expected @FILE or the prompt itself")
    if _LIKE_A_FILE.fullmatch(text):
        raise InputError(f"--prompt is {text}, which looks like a file and is not there; check the path")
    return None


def read_prompt(text: str) -> str:
    """A prompt as it is given, or as it stands in the file that is named.

    Raises:
        InputError: the file is not there, is empty, too long, or no text in UTF-8.
    """
    path = prompt_file(text)
    if path is None:
        return text
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise InputError(f"--prompt is {text}, a file of {size} bytes; expected a prompt, of some KB at the most")
        prompt = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt is {text}, which is no text in UTF-8 ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"--prompt is {text}, which cannot be read: {error.strerror}; check the file") from error
    if not prompt or "\0" in prompt:
        raise InputError(f"--prompt is {text}, which holds no text; write the prompt into it")
    return prompt


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a prompt may be longer than names of files, or hold what no name can
        return False


def seconds_of(text: str, option: str) -> float:
    """Seconds from "90", "90.5", "90s", "1:30" or "1:02:03.5".

    Raises:
        ConfigError: anything else.
    """
    parts = text.strip().removesuffix("s").rstrip().split(":")
    numbers = [float(part) if _NUMBER.fullmatch(part) else math.nan for part in parts]
    whole = all("." not in part for part in parts[:-1])
    if len(parts) > 3 or not whole or math.isnan(sum(numbers)) or any(number >= 60 for number in numbers[1:]):
        raise ConfigError(f"{option} is {text!r}; expected seconds, as 90 or 90.5, or mm:ss, as 1:30 or 1:02:03.5")
    return sum(number * 60**place for place, number in enumerate(reversed(numbers)))


def settled_seed(seed: int) -> int:
    """The seed itself, or one that is drawn, and said, where it is to be any."""
    if seed != DRAWN:
        return seed
    drawn = secrets.randbelow(2**31)
    log.info("--base_seed %d: drawn is %d, which makes the same video again", DRAWN, drawn)
    return drawn


def refuse_seeds_of_their_own(seed: int, ranks: int) -> None:
    """Raises: ConfigError where each of several ranks, started by somebody else, would draw a seed."""
    if seed == DRAWN and ranks > 1:
        raise ConfigError(
            f"--base_seed is {DRAWN}, and each of {ranks} ranks would draw one of its own; expected a number from 0 "
            "on, or --gpus to start the ranks"
        )


def place_of_video(out: Path | None, save_dir: Path | None, request: Request) -> Path:
    """The file to write: ``out``, or one in ``save_dir`` whose name is the same for the same request.

    Raises:
        ConfigError: both were given, or none; ``save_dir`` is or lies in something else than a folder.
    """
    if out is not None and save_dir is not None:
        raise ConfigError(
            f"--out is {out} and --save_dir is {save_dir}; expected one of them, a file to write or a folder for it"
        )
    if out is not None:
        return out
    if save_dir is None:
        raise ConfigError("--out is missing; expected a file to write, or --save_dir with a folder for it")
    steps, seed = f"{request.sample_steps}step", f"seed{request.base_seed}"
    stems = ["+".join(path.stem for path in paths)[:_PART_LENGTH] for paths in (request.portraits, request.voices)]
    parts = [*stems, request.size, steps, seed]
    there = next(folder for folder in (save_dir, *save_dir.parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise ConfigError(f"--save_dir is {save_dir}, and {there} is no folder; name another")
    return save_dir / ("_".join(re.sub(r"[^\w.+-]+", "x", part) for part in parts) + ".mp4")


if TYPE_CHECKING:
    from lowvram.offload.placement import MemoryOptions
    from lowvram.parallel.layout_agreement import RankOptions
    from lowvram.pipeline import AvatarPipeline
    from lowvram.request import Request

FILE = click.Path(path_type=Path)


def either_spelling(name: str) -> str:
    """Both ``--infer_frames`` and ``--infer-frames``."""
    return name.replace("_", "-")


SETTINGS: dict[str, Any] = {
    "token_normalize_func": either_spelling,
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "max_content_width": 110,
}


def switch(name: str, default: bool | None, text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A switch that may stand alone or with a value: ``--offload_model``, ``--offload_model True``."""
    return click.option(name, is_flag=False, flag_value="true", type=bool, default=default, help=text)


def declared(options: Sequence[Callable[..., Any]], command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with all of ``options``, which ``--help`` shows in that order."""
    for option in reversed(options):
        command = option(command)
    return command


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say what to make, and on what: shared by ``infer`` and ``compare --model``."""
    return declared([*_made(), *_made_on()], command)


def machine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say on what it is made alone: those of ``serve``, which is told later what to make."""
    return declared(_made_on(), command)


def _made() -> list[Callable[..., Any]]:
    return [
        click.option("--size", default="704*384", help='Area "A*B"; the portrait decides the shape.'),
        switch("--upscale", False, "Scale a portrait that is smaller than --size up to it."),
        click.option(
            "--audio-track", type=int, help="Sound track to take, from 1 on; default: the first that is not silent."
        ),
        click.option("--audio-start", help="Where the voice begins in the file: seconds or mm:ss."),
        click.option("--audio-duration", help="How much of it to take, likewise; default: the rest."),
        click.option("--infer-frames", type=int, default=48, help="Video frames a clip: a multiple of 4 from 12 on."),
        click.option("--num-clip", type=int, help="Clips to make, at most; default: as many as the audio fills."),
        click.option("--sample-steps", type=int, default=4, help="Denoising steps a block."),
        click.option("--sample-solver", type=click.Choice(["euler"]), default="euler", help="The solver."),
        click.option(
            "--base-seed", type=int, default=420, help="Clip r's noise is seeded with base_seed + r; -1 draws one."
        ),
        click.option(
            "--cond-rope-distance", default="30", help='How far a block sees the reference frame: 0..30 or "random".'
        ),
        switch("--enable-online-decode", True, "Decode each block at once; False decodes a clip at a time."),
    ]


def _made_on() -> list[Callable[..., Any]]:
    return [
        click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N."),
        click.option("--dtype", default="auto", help="Of what is not 8-bit: auto, float32 or bfloat16."),
        switch("--offload-model", False, "Keep all of the DiT's layers on the host; each is copied in as it runs."),
        switch("--offload-kv-cache", False, "Keep all KV rings in host memory."),
        switch("--t5-cpu", False, "Encode the prompt on the host."),
        click.option(
            "--vram-budget", "--vram", help="GPU memory to stay within: 22.15GiB, 16g, 24GB; default: what is free."
        ),
        click.option("--ram-budget", "--ram", help="Host memory to stay within, likewise; default: what is free."),
        click.option("--kv", type=click.Choice(["auto", "int8", "bf16"]), default="auto", help="KV rings and sink."),
        click.option("--wave", default="auto", help="Steps that share a pass over the layers: auto, 1 to the steps."),
        click.option("--no-fallback", is_flag=True, help="Out of memory, fail at once instead of going on slower."),
        switch("--cuda-graphs", None, "Replay what stays on the GPU as CUDA graphs; default: where selftest saw it."),
        switch("--allow-quality-loss", False, "Out of memory, also shorten clips, shrink the picture, drop steps."),
        click.option("--verify", is_flag=True, help="Check the artifact's checksums first."),
        click.option("--no-selftest", is_flag=True, help="Do not examine a GPU that is new here; see selftest."),
    ]


def rank_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say how several GPUs share the work."""
    options: list[Callable[..., Any]] = [
        click.option("--gpus", type=int, help="Start so many ranks here, one a GPU; torchrun starts them otherwise."),
        click.option(
            "--num-gpus-dit", type=int, help="GPUs for the DiT: stages x ulysses_size; default: all but VAE's."
        ),
        click.option("--ulysses-size", type=int, help="GPUs that share tokens and heads of a denoising step."),
        switch("--enable-vae-parallel", None, "One GPU more decodes meanwhile; default: from 4 GPUs on."),
        click.option("--port", type=int, help="Where --gpus lets ranks meet; default: any that is free."),
    ]
    return declared(options, command)


def make_rank_options(options: dict[str, Any]) -> RankOptions:
    """How several GPUs share the work."""
    from lowvram.parallel.layout_agreement import RankOptions

    return RankOptions(**fields_of(RankOptions, options))


def fields_of(kind: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Those options that are fields of a dataclass."""
    return {field.name: options[field.name] for field in dataclasses.fields(kind) if field.name in options}


def open_pipeline(options: dict[str, Any], *, resident: bool = False) -> AvatarPipeline:
    """The artifact of ``--model``, on a device that is known; ``resident``: weights stay for the next video."""
    from lowvram.devices import choose_device
    from lowvram.pipeline import AvatarPipeline
    from lowvram.selftest.first_run import get_ready

    memory = memory_options(options)  # before minutes are spent on a GPU that is new here
    if not options["no_selftest"]:
        get_ready(choose_device(options["device"]))
    settings = {name: options[name] for name in ("device", "dtype", "verify")}
    if resident:
        settings["resident"] = True
    return AvatarPipeline.from_artifact(options["model"], memory=memory, **settings)


def memory_options(options: dict[str, Any]) -> MemoryOptions:
    """What is said of memory."""
    from lowvram.offload.placement import MemoryOptions

    settled = options | settled_memory(options)
    return MemoryOptions(**fields_of(MemoryOptions, settled), fallback=not options["no_fallback"])


def settled_memory(options: dict[str, Any]) -> dict[str, Any]:
    """Budgets in bytes, and a wave that is a number as one."""
    budgets = {
        name: None if options[name] is None else parse_bytes(options[name], f"--{either_spelling(name)}")
        for name in ("vram_budget", "ram_budget")
    }
    wave = options["wave"]
    return {**budgets, "wave": int(wave) if wave.isdecimal() else wave}


def make_request(options: dict[str, Any]) -> Request:
    """What to make."""
    from lowvram.request import Request

    distance = options["cond_rope_distance"]
    start, duration = (
        None if options[name] is None else seconds_of(options[name], f"--{either_spelling(name)}")
        for name in ("audio_start", "audio_duration")
    )
    names = ("image", "audio", "size", "upscale", "audio_track", "infer_frames", "num_clip", "sample_steps")
    return Request(
        **{name: options[name] for name in names},
        prompt=read_prompt(options["prompt"]),
        base_seed=settled_seed(options["base_seed"]),
        cond_rope_distance=int(distance) if distance.lstrip("-").isdigit() else distance,
        online_decode=options["enable_online_decode"],
        audio_start=start or 0.0,
        audio_duration=duration,
        masks=tuple(options.get("masks") or ()),
        pose_video=options.get("pose_video"),
    )
