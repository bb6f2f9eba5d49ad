"""A reference: what a baseline did, recorded once into a folder that can be taken elsewhere, for any artifact to be
scored against.

The folder has the portrait and the voice, the baseline's video and report, every block (``block_files``), and
``reference.json`` with settings, versions and a checksum of each file.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path, PurePosixPath
from typing import Any

from lowvram.compare.block_files import CONDITIONS, FRAMES, LATENTS, STEPS, block_file, read_trajectory
from lowvram.compare.sources import REFERENCE
from lowvram.compare.trajectories import Trajectory
from lowvram.compare.vae_errors import Likeness
from lowvram.pipeline import Request
from lowvram_kernels.errors import InputError, LowvramError
from lowvram_quantize.slabs import sha256_file

FORMAT, VERSION = "lowvram reference", 1
BLOCKS, VIDEO, REPORT = "blocks", "baseline.mp4", "baseline.json"
FILES = ("image", "audio")
"""Settings that are files, which lie in the folder."""
_NUMBER = (int, float)
_KINDS: dict[str, tuple[type, ...]] = {
    "image": (str,), "audio": (str,), "prompt": (str,), "size": (str,), "infer_frames": (int,),
    "num_clip": (int, type(None)), "sample_steps": (int,), "base_seed": (int,), "cond_rope_distance": (int, str),
    "online_decode": (bool,), "upscale": (bool,), "audio_track": (int, type(None)), "audio_start": _NUMBER,
    "audio_duration": (*_NUMBER, type(None)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """An opened one. Its ``request`` makes the baseline's video again; the trajectories are of all its blocks."""

    path: Path
    facts: dict[str, Any]
    request: Request

    @classmethod
    def open(cls, path: Path) -> Reference:
        """Open the folder and compare the checksums of all its files.

        Raises:
            InputError: as of ``read`` and ``verify``.
        """
        found = cls.read(path)
        found.verify()
        return found

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Open the folder by what its JSON says, which takes no time; ``verify`` looks at the files.

        Raises:
            InputError: no reference, one of another version, or a JSON that is damaged.
        """
        facts = _read(path)
        try:
            settings, files = dict(facts["settings"]), dict(facts["files"])
            blocks, steps = facts["blocks"], facts["steps"]
            if not (type(blocks) is type(steps) is int and blocks > 0 and steps > 0):
                raise ValueError(f"{blocks} blocks of {steps} steps")
            _check_listed(files)
            request = _request(path, settings, files)
            wanted = [block_file(Path(BLOCKS), kind, i) for i in range(blocks) for kind in (LATENTS, STEPS, FRAMES)]
            wanted.append(Path(BLOCKS) / CONDITIONS)
            if missing := [str(name) for name in (*wanted, REPORT, VIDEO) if str(name) not in files]:
                raise ValueError(f"{missing[0]} is not listed")
            dict(facts["artifact"]["dit"])
            _portrait(facts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{path / REFERENCE} is damaged ({said}): record it again") from error
        return cls(path=path, facts=facts, request=request)

    def verify(self) -> None:
        """Make sure that the files are what they were when it was recorded; reads all of them.

        Raises:
            InputError: one is missing, or has changed.
        """
        _check_files(self.path, self.facts["files"])

    @property
    def report(self) -> Path:
        """The baseline's."""
        return self.path / REPORT

    @property
    def blocks(self) -> int:
        return int(self.facts["blocks"])

    @property
    def total(self) -> int:
        return self.blocks

    @property
    def steps(self) -> int:
        return int(self.facts["steps"])

    @property
    def portrait(self) -> Likeness | None:
        """How the portrait came back from the baseline's VAE; None of a reference that was recorded without it."""
        return _portrait(self.facts)

    def trajectory(self, block: int) -> Trajectory:
        """What the baseline did in one block."""
        return read_trajectory(self.path / BLOCKS, block)


def _read(path: Path) -> dict[str, Any]:
    file = path / REFERENCE
    if not file.is_file():
        what = "is no reference" if path.exists() else "is not there"
        raise InputError(f"--reference is {path}, which {what}; expected a folder that compare record made")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error}): record it again") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise InputError(f"{file} is no reference's: expected one that compare record made")
    if facts.get("version") != VERSION:
        raise InputError(
            f"{file} is of version {facts.get('version')!r}, this lowvram reads version {VERSION}; record it again"
        )
    return facts


def _portrait(facts: dict[str, Any]) -> Likeness | None:
    found = facts.get("portrait")
    if found is None:
        return None
    figures = {name: found[name] for name in ("psnr", "ssim")}
    if any(type(figure) not in _NUMBER or not math.isfinite(figure) for figure in figures.values()):
        raise ValueError(f"portrait came back from the VAE as {found}")
    return Likeness(**figures)


def _check_listed(files: dict[str, Any]) -> None:
    for name, facts in files.items():
        if (place := PurePosixPath(name)).is_absolute() or ".." in place.parts:
            raise ValueError(f"{name} lies outside the folder")
        if type(facts["bytes"]) is not int or type(facts["sha256"]) is not str:
            raise ValueError(f"{name} is listed with {facts}")


def _check_files(folder: Path, files: dict[str, Any]) -> None:
    for name, facts in files.items():
        path = folder / name
        nbytes, expected = facts["bytes"], facts["sha256"]
        if not path.is_file() or path.stat().st_size != nbytes:
            said = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
            raise InputError(
                f"{path} {said}, {REFERENCE} says {nbytes} bytes: copy the whole folder, or record it again"
            )
        try:
            got = sha256_file(path)
        except (OSError, LowvramError) as error:
            raise InputError(f"{path} cannot be read ({error}): copy it, or record it again") from error
        if got != expected:
            raise InputError(
                f"{path} has checksum {got[:16]}, {REFERENCE} says {expected[:16]}: bytes have changed since it "
                "was recorded; copy the folder, or record it again"
            )


def _request(folder: Path, settings: dict[str, Any], files: dict[str, Any]) -> Request:
    for name, kinds in _KINDS.items():
        if type(settings[name]) not in kinds:
            raise ValueError(f"{name} is {settings[name]!r}")
    if beyond := settings.keys() - _KINDS.keys():
        raise ValueError(f"{', '.join(sorted(beyond))} is no setting")
    for name in FILES:
        if settings[name] not in files:
            raise ValueError(f"{settings[name]} is not listed")
    return Request(**settings | {name: folder / settings[name] for name in FILES})
