"""Recording a reference: the baseline's run, kept block by block in a folder that has its name when it is whole."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowvram.compare.block_files import BlockRecorder, TrajectoryFiles, full
from lowvram.compare.reference import BLOCKS, FILES, FORMAT, REPORT, VERSION, VIDEO
from lowvram.compare.sources import REFERENCE
from lowvram.compare.vae_errors import portrait_there_and_back
from lowvram.infer import Watching, infer, write_json
from lowvram.outputs import Outputs, check_apart, check_folder
from lowvram.pipeline import AvatarPipeline, Request
from lowvram_kernels.errors import ConfigError, InputError
from lowvram_quantize.claims import replacing, writing
from lowvram_quantize.format import MANIFEST
from lowvram_quantize.places import real, within
from lowvram_quantize.slabs import sha256_file

_UNFINISHED = "unfinished"
_COPIES = {"image": "portrait", "audio": "voice"}
_NOT_RECORDED = ("masks", "pose_video")


def check_reference(folder: Path, inputs: Mapping[str, Path], *, overwrite: bool) -> None:
    """Look before the work whether a reference can be made in ``folder``; ``inputs`` are files that are read, by
    option.

    Raises:
        InputError: something is there that is no reference, or one that is not to be replaced or is in use; one place
            for two things.
        OutputError: nothing can be made there.
    """
    place = real(folder)
    check_apart({"--out": folder, "--out, unfinished": _partial(place)}, inputs)
    for option, path in inputs.items():
        if within(path, place):
            raise InputError(f"{option} is {path}, inside --out {folder}, which is to be made; name another folder")
    if not os.path.lexists(place.parent):
        raise InputError(f"--out is {folder}: the folder {place.parent} does not exist; make it first")
    check_folder("--out", folder, make=True)
    if (place / REFERENCE).is_file():
        if not overwrite:
            raise InputError(f"--out is {folder}, which is a reference already; choose another name, or --overwrite it")
        with replacing(place / REFERENCE):  # nobody scores against it now
            pass
    elif place.is_dir() and any(place.iterdir()):
        raise InputError(f"--out is {folder}, which holds files and is no reference; choose another folder")


def record_reference(
    pipeline: AvatarPipeline, request: Request, folder: Path, *, overwrite: bool = False, quiet: bool = False
) -> Path:
    """Let the baseline make its video, and keep all that a candidate is scored by in ``folder``, which is returned.

    Raises:
        InputError: as of ``check_reference``; a portrait or voice that cannot be used; NaN or infinity in what the
            baseline made.
        ConfigError: a pipeline of several ranks; several people, or poses.
        OutputError: a full disk.
        LowvramError: as of ``AvatarPipeline.stream``.
    """
    if len(request.portraits) + len(request.voices) > 2 or any(getattr(request, name) for name in _NOT_RECORDED):
        raise ConfigError("a reference is of one portrait and one voice; leave other people, masks and poses out")
    artifact = pipeline.runtime.artifact
    inputs = {**request.files, "--model": artifact.path}
    check_reference(folder, inputs, overwrite=overwrite)
    place = real(folder)
    with writing(place, "lowvram compare record"), _unfinished(place) as partial:
        copies = _copied(request, partial)
        (partial / BLOCKS).mkdir()
        counts = _run(pipeline, request, partial, copies, quiet=quiet)
        _describe(pipeline, request, partial, copies, counts)
        _put(partial, place)
    return folder


def _run(
    pipeline: AvatarPipeline, request: Request, partial: Path, copies: dict[str, str], *, quiet: bool
) -> dict[str, int]:
    """Make the video; says how many blocks there are, and steps each."""
    blocks = partial / BLOCKS
    trajectories = TrajectoryFiles(blocks)
    watching = Watching(begun=trajectories.watcher.begun, recorder=lambda: BlockRecorder(blocks), kept=blocks)
    report = infer(pipeline, request, Outputs(video=partial / VIDEO), quiet=quiet, watching=watching)
    report |= {"video": VIDEO, "dump_tensors": BLOCKS}
    report["settings"] |= copies
    write_json(partial / REPORT, report)
    return {"blocks": trajectories.blocks, "steps": trajectories.steps}


def _describe(
    pipeline: AvatarPipeline, request: Request, partial: Path, copies: dict[str, str], counts: dict[str, int]
) -> None:
    artifact = pipeline.runtime.artifact
    files = sorted(path for path in partial.rglob("*") if path.is_file() and path != partial / _UNFINISHED)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "made": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "settings": {key: value for key, value in (vars(request) | copies).items() if key not in _NOT_RECORDED},
        **counts,
        "portrait": _likeness(pipeline, request),
        "artifact": {
            "path": str(artifact.path),
            "sha256": sha256_file(artifact.path / MANIFEST),
            "precision": artifact.precisions(),
            "dit": artifact.component("dit").config,
        },
        "files": {
            path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in files
        },
    }
    write_json(partial / REFERENCE, facts)


def _likeness(pipeline: AvatarPipeline, request: Request) -> dict[str, float] | None:
    """How the portrait comes back from the baseline's VAE; None where it comes back as it was, which strict JSON has no
    number for."""
    found = dataclasses.asdict(portrait_there_and_back(pipeline, request))
    return found if all(math.isfinite(figure) for figure in found.values()) else None


def _copied(request: Request, partial: Path) -> dict[str, str]:
    """Portrait and voice, as they are, under names of their own."""
    names = {}
    for option in FILES:
        path: Path = getattr(request, option)
        names[option] = f"{_COPIES[option]}{path.suffix}"
        try:
            source = path.open("rb")
        except OSError as error:
            raise InputError(f"--{option} is {path}, which cannot be read: {error.strerror}; check the path") from error
        target = partial / names[option]
        with source, _disk(target, path.stat().st_size), target.open("wb") as file:
            shutil.copyfileobj(source, file)
    return names


def _partial(place: Path) -> Path:
    return place.with_name(f"{place.name}.partial")


@contextlib.contextmanager
def _unfinished(place: Path) -> Iterator[Path]:
    """An empty folder beside ``place``; what is in it goes if it is still there at the end."""
    partial = _partial(place)
    if (partial / _UNFINISHED).is_file():  # of a recording that was killed
        shutil.rmtree(partial)
    if os.path.lexists(partial):
        raise InputError(f"{partial} is there, and no recording has left it; choose another name for --out")
    with _disk(partial, 0):
        partial.mkdir()
        (partial / _UNFINISHED).touch()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(partial: Path, place: Path) -> None:
    """Give the folder its name; what had it goes. The mark goes last: without one, and under its other name, the folder
    would be taken for somebody else's."""
    if not (place / REFERENCE).is_file():
        with _disk(place, 0):
            partial.rename(place)
            (place / _UNFINISHED).unlink()
        return
    old = place.with_name(f"{place.name}.replaced-{os.getpid()}")
    with replacing(place / REFERENCE), _disk(place, 0):
        place.rename(old)
        try:
            partial.rename(place)
        except OSError:
            old.rename(place)
            raise
        (place / _UNFINISHED).unlink()
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _disk(path: Path, nbytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise full(path, nbytes, error) from error
