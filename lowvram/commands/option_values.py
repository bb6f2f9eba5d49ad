"""What some values of options stand for: a prompt that lies in a file, a seed to be drawn, a folder to write into."""

from __future__ import annotations

import logging
import math
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

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
        ConfigError: both were given, or none.
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
    parts = [request.image.stem[:_PART_LENGTH], request.audio.stem[:_PART_LENGTH], request.size, steps, seed]
    return save_dir / ("_".join(re.sub(r"[^\w.+-]+", "x", part) for part in parts) + ".mp4")
