"""A take's state on the disk: a folder beside the video, of which the newest whole state counts."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lowvram_kernels.errors import InputError, OutputError

Tensor = torch.Tensor
VERSION = 1
FACTS = "state.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """``take`` is what the take is called, ``next_block`` the block that comes next, ``segments`` the names of the
    files that are finished, ``frames`` how many video frames they have together."""

    folder: Path
    take: str
    next_block: int
    segments: tuple[str, ...]
    frames: int

    def part(self, name: str) -> dict[str, Tensor]:
        """A part of it, on the host.

        Raises:
            InputError: it is missing or damaged.
        """
        path = self.folder / f"{name}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} cannot be read ({error}): expected a part of the state that was saved; begin again without "
                "--resume"
            ) from error


def folder_of(video: Path) -> Path:
    """Where the states of a take lie whose segments are called like ``video``."""
    return video.with_suffix(".state")


def save(place: Path, state: State, parts: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
    """Write a state into ``state.folder``, part by part, and then let go of earlier ones in ``place``. What a process
    that is killed leaves of it does not count.

    Raises:
        OutputError: a full disk, or any other failure to write; the state of before stays.
    """
    try:
        shutil.rmtree(state.folder, ignore_errors=True)
        state.folder.mkdir(parents=True)
        for name, tensors in parts:
            path = state.folder / f"{name}.safetensors"
            save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, path)
            _settled(path)
        facts = dataclasses.asdict(state) | {"version": VERSION}
        del facts["folder"]
        partial = state.folder / f"{FACTS}.partial"
        partial.write_text(json.dumps(facts), encoding="utf-8")
        _settled(partial)
        partial.replace(state.folder / FACTS)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(state.folder, ignore_errors=True)
        free = shutil.disk_usage(place.absolute().parent).free
        raise OutputError(
            f"the state {state.folder} could not be written: {error} ({free} bytes free); segments so far are whole, "
            "free some space and go on with --resume"
        ) from error
    for other in place.iterdir():
        if other != state.folder:
            shutil.rmtree(other, ignore_errors=True)


def latest(place: Path) -> State | None:
    """The newest whole state in ``place``; None where there is none.

    Raises:
        InputError: it is of another edition, or damaged.
    """
    found = sorted(path.parent for path in place.glob(f"*/{FACTS}"))
    if not found:
        return None
    try:
        facts: dict[str, Any] = json.loads((found[-1] / FACTS).read_text(encoding="utf-8"))
        if facts.pop("version") != VERSION:
            raise ValueError("it is of another edition of lowvram")
        return State(folder=found[-1], **facts | {"segments": tuple(facts["segments"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{found[-1] / FACTS} cannot be used ({error}): expected a state of version {VERSION}; begin again without "
            "--resume"
        ) from error


def _settled(path: Path) -> None:
    """Have it on the disk before what says that it is there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
