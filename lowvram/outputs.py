"""Outputs of a run: checked before anything loads, claimed while it is made, and nothing of before lost by it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lowvram_kernels.errors import ConfigError, InputError, OutputError
from lowvram_quantize.claims import writing
from lowvram_quantize.places import nearest_folder, real, same, takes_files, takes_name, within

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where a run writes: the video, and on demand all tensors, a report, and memory over time. ``overwrite``: what is
    there may go; ``make_folder``: the folder of the video is made where it is not there; ``folder_option``: the option
    that named the folder of all of them, where their own were not given. With ``segment_minutes`` the video comes in
    segments of about so many minutes, called like it; ``resume`` goes on where another run of the same take was.

    Raises:
        ConfigError: ``segment_minutes`` is not above 0, or ``resume`` without it.
    """

    video: Path
    dump_tensors: Path | None = None
    report: Path | None = None
    memory_log: Path | None = None
    overwrite: bool = False
    make_folder: bool = False
    folder_option: str = ""
    segment_minutes: float | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        minutes = self.segment_minutes
        if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
            raise ConfigError(f"--segment-minutes is {minutes:g}; expected more than 0, or none for a single file")
        if self.resume and minutes is None:
            raise ConfigError("--resume goes on with a video in segments; give --segment-minutes as before")

    @classmethod
    def in_folder(cls, folder: Path, name: str, option: str, *, overwrite: bool) -> Outputs:
        """All three, called ``name``, in the folder that ``option`` named."""
        video, tensors, report = (folder / f"{name}.{ending}" for ending in ("mp4", "safetensors", "json"))
        return cls(video=video, dump_tensors=tensors, report=report, overwrite=overwrite, folder_option=option)

    @property
    def named(self) -> dict[str, Path]:
        """What is to be written, by its option."""
        every = {
            "--out": self.video,
            "--dump-tensors": self.dump_tensors,
            "--report": self.report,
            "--memory-log": self.memory_log,
        }
        given = {option: path for option, path in every.items() if path is not None}
        if self.folder_option:
            return {f"{self.folder_option} with its {path.name}": path for path in given.values()}
        return given

    @property
    def unfinished(self) -> dict[str, Path]:
        """What is written under another name first, by what it is."""
        others = {option: path for option, path in self.named.items() if path != self.video}
        kept = {
            f"{option}, unfinished": real(path).with_name(f"{path.name}.partial") for option, path in others.items()
        }
        return kept | {"the unfinished video": self.partial}

    @property
    def partial(self) -> Path:
        """What the video is called until it is finished."""
        video = real(self.video)
        return video.with_name(f"{video.stem}.partial{video.suffix}")

    def check(self, inputs: Mapping[str, Path] | None = None) -> None:
        """Look before a long run whether all of it can be written; ``inputs`` are files that it reads, by option.

        Raises:
            InputError: no MP4, no such folder, a folder's name, a mount point, a file that is there already, or one
                place for two things.
            OutputError: a folder in which nothing can be written.
        """
        if self.video.suffix.lower() != ".mp4":
            raise InputError(f"--out is {self.video}; expected a name that ends in .mp4")
        check_apart({**self.named, **self.unfinished}, inputs or {})
        for option, path in self.named.items():
            to_make = self.make_folder and path == self.video
            _check_place(option, real(path), overwrite=self.overwrite or self.resume, make_folder=to_make)

    @contextlib.contextmanager
    def claimed(self, command: str = "lowvram infer") -> Iterator[None]:
        """Be the only run that writes there, as others are told; an unfinished video of an earlier one gets another
        name.

        Raises:
            InputError: another run writes there; which one.
            OutputError: the folder could not be made.
        """
        with contextlib.ExitStack() as claims:
            if self.make_folder:
                claims.enter_context(_folder(real(self.video).parent))
            for path in self.named.values():
                claims.enter_context(writing(real(path), command))
            _put_aside(self.partial)
            yield


def check_apart(outputs: Mapping[str, Path], inputs: Mapping[str, Path]) -> None:
    """Whether everything that is written, and read, has a place of its own; both by option.

    Raises:
        InputError: two are one, or one lies in a folder that is read.
    """
    there = list(outputs.items())
    for index, (option, path) in enumerate(there):
        for other, taken in (*there[:index], *inputs.items()):
            if same(path, taken):
                raise InputError(
                    f"{option} and {other} are both {path}: one would destroy the other; name another file"
                )
        for other, taken in inputs.items():
            if within(path, taken):
                raise InputError(f"{option} is {path}, inside {other}; name a file in another folder")


def check_file(option: str, path: Path, *, overwrite: bool) -> None:
    """Look before the work whether ``option`` names a file that can be written.

    Raises:
        InputError, OutputError: as of ``Outputs.check``.
    """
    _check_place(option, real(path), overwrite=overwrite, make_folder=False)


def check_folder(option: str, folder: Path, *, make: bool) -> None:
    """Look before the work whether files can be made in the folder that ``option`` names, or that is to be made.

    Raises:
        InputError: a file, or no such folder.
        OutputError: nothing can be made there.
    """
    there = nearest_folder(real(folder)) if make else real(folder)
    if not os.path.isdir(there):
        where = f"{folder}" if there == real(folder) else f"{folder}, in {there}"
        said = "is no folder; name another" if os.path.lexists(there) else "does not exist; make it first"
        raise InputError(f"{option} is {where}, which {said}")
    takes_files(there, f"{option} {folder}")
    takes_name(real(folder), f"{option} {folder}")


def _check_place(option: str, path: Path, *, overwrite: bool, make_folder: bool) -> None:
    if os.path.isdir(path):
        raise InputError(f"{option} is {path}, a folder; name a file to write")
    folder = nearest_folder(path.parent) if make_folder else path.parent
    if not os.path.isdir(folder):
        said = "is no folder; name another" if os.path.lexists(folder) else "does not exist"
        raise InputError(f"{path} cannot be written: the folder {folder} {said}")
    if os.path.ismount(path) or (os.path.lexists(path) and not os.path.isfile(path)):
        raise InputError(f"{option} is {path}, which is mounted or no ordinary file; name a file in a folder instead")
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"{option} is {path}, which is there already; choose another name, or replace it: --overwrite")
    takes_files(folder, str(path))
    takes_name(path, str(path))


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make it, and what leads to it; what is made and stays empty goes again."""
    made = [above for above in (folder, *folder.parents) if not above.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {folder} cannot be made ({error.strerror}); choose another") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for above in made:
                above.rmdir()


def _put_aside(partial: Path) -> None:
    if not partial.exists():
        return
    kept = next(name for name in _numbered(partial) if not name.exists())
    partial.rename(kept)
    log.warning("the unfinished video of an earlier run, %s, is called %s now", partial.name, kept.name)


def _numbered(partial: Path) -> Iterable[Path]:
    count = 0
    while True:
        count += 1
        yield partial.with_name(f"{partial.stem}.{count}{partial.suffix}")
