"""The place of an artifact: looked at before the work, and taken by the finished folder in one step."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lowvram_kernels.errors import ConfigError, InputError, OutputError
from lowvram_quantize.claims import replacing
from lowvram_quantize.format import MANIFEST
from lowvram_quantize.writer import disk_errors


def check_target(out: Path, *, overwrite: bool) -> None:
    """Raises: ConfigError or InputError where ``out`` cannot become an artifact."""
    if out.name in ("", ".."):
        raise ConfigError(f"{out} names no folder that can be made; expected one as {out / 'artifact'}")
    real = Path(os.path.realpath(out))
    if not real.parent.is_dir():
        raise InputError(f"{out} cannot be made: the folder {real.parent} does not exist; create it first")
    try:
        with tempfile.TemporaryFile(dir=real.parent):
            pass
    except OSError as error:
        raise OutputError(
            f"{out} cannot be made: nothing can be written in {real.parent} ({error.strerror}); choose another folder"
        ) from error
    if os.path.ismount(real):
        raise ConfigError(
            f"{out} is a mount point, which no finished folder can replace; name one inside: {out / 'artifact'}"
        )
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise ConfigError(f"{out} exists and is no artifact; choose another name for it")
    if (out / MANIFEST).is_file() and not overwrite:
        raise ConfigError(f"{out} holds a finished artifact; choose another name, or replace it with --overwrite")


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
                replaced = out.with_name(out.name + ".replaced")
                shutil.rmtree(replaced, ignore_errors=True)
                out.rename(replaced)
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
