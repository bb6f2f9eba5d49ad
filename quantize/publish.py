"""The place of an artifact: looked at before the work, and taken by the finished folder in one step."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowvram_kernels.errors import ConfigError, InputError
from lowvram_quantize.claims import replacing
from lowvram_quantize.format import MANIFEST
from lowvram_quantize.places import real, same, takes_files, takes_name, within
from lowvram_quantize.writer import disk_errors

# All that a conversion leaves in its unfinished folder.
_UNFINISHED = re.compile(
    r"\w+\.safetensors(\.journal)?|dit\.errors|sources\.sha256|audio_encoder|tokenizer|" + re.escape(MANIFEST)
)


def partial_of(out: Path) -> Path:
    """The folder that an artifact is called until it is finished."""
    return out.with_name(out.name + ".partial")


def check_target(out: Path, *, overwrite: bool) -> None:
    """Raises: ConfigError or InputError where ``out`` cannot become an artifact."""
    if out.name in ("", ".."):
        raise ConfigError(f"{out} names no folder that can be made; expected one as {out / 'artifact'}")
    place = real(out)
    if not os.path.isdir(place.parent):
        raise InputError(f"{out} cannot be made: the folder {place.parent} does not exist; create it first")
    takes_files(place.parent, str(out))
    takes_name(place, str(out))
    if os.path.ismount(place):
        raise ConfigError(
            f"{out} is a mount point, which no finished folder can replace; name one inside: {out / 'artifact'}"
        )
    _check_partial(partial_of(place))
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise ConfigError(f"{out} exists and is no artifact; choose another name for it")
    if (out / MANIFEST).is_file() and not overwrite:
        raise ConfigError(f"{out} holds a finished artifact; choose another name, or replace it with --overwrite")


def check_inputs(out: Path, inputs: Iterable[tuple[str, Path | None]]) -> None:
    """Look before anything is written whether ``out``, or what it is called until it is finished, is, lies in, or
    holds one of the ``inputs``: options and what they name.

    Raises:
        InputError: the first that does.
    """
    place = real(out)
    for option, path in inputs:
        if path is None:
            continue
        for target, said in ((place, f"--out is {out}"), (partial_of(place), f"--out is {out}, and {place}.partial")):
            if same(target, path):
                raise InputError(f"{said} is what {option} names, and would be destroyed; choose another --out")
            if within(target, path):
                raise InputError(f"{said} lies inside {path}, which {option} names; choose another --out")
            if within(path, target):
                raise InputError(f"{said} holds {path}, which {option} names, and would go; choose another --out")


def _check_partial(partial: Path) -> None:
    """What somebody else keeps under that name would be removed, and what a link in it leads to be written over."""
    if not os.path.lexists(partial):
        return
    words = "where an unfinished artifact lies, "
    if partial.is_symlink() or not partial.is_dir():
        raise ConfigError(f"{partial}, {words}is no folder; move it away, or choose another --out")
    strange = [
        each.name
        for each in sorted(partial.iterdir())
        if not _UNFINISHED.fullmatch(each.name) or each.is_symlink() or (each.is_file() and each.stat().st_nlink > 1)
    ]
    if strange:
        names = ", ".join(strange[:3])
        raise ConfigError(
            f"{partial}, {words}holds what convert did not write there ({names}); move it away, or choose another --out"
        )


def publish(partial: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest last, then give the whole folder its name."""
    with disk_errors(partial, 0):
        text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
        with (partial / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _remove_strays(partial, {MANIFEST, *manifest["files"], *(c["file"] for c in manifest["components"].values())})
        if (out / MANIFEST).exists():
            with replacing(out / MANIFEST):
                replaced = Path(tempfile.mkdtemp(prefix=f"{out.name}.replaced-", dir=out.parent))
                out.rename(replaced)  # an empty folder, which gives way
                partial.rename(out)
                shutil.rmtree(replaced)
        else:
            partial.rename(out)  # which may be an empty folder


def _remove_strays(folder: Path, kept: set[str]) -> None:
    """Remove what the manifest does not list: journals, and what interrupted runs have left."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif path.is_file() and path.relative_to(folder).as_posix() not in kept:
            path.unlink()
