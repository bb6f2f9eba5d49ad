"""A finished artifact's manifest, written anew with something more in it; the weights stay as they are."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lowvram_quantize.asked import Asked
from lowvram_quantize.claims import replacing, writing
from lowvram_quantize.format import MANIFEST, Artifact
from lowvram_quantize.original import Original, original_as
from lowvram_quantize.places import real, takes_files
from lowvram_quantize.publish import check_inputs
from lowvram_quantize.writer import disk_errors


class Amendable:
    """An artifact that nobody else reads or writes meanwhile. See ``amending``."""

    def __init__(self, artifact: Artifact):
        self.artifact = artifact

    def amend(self, key: str, value: dict[str, Any], tensors: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """Say ``value`` under ``key`` of the manifest from now on: all of it, or, where that fails, nothing.

        Args:
            tensors: safetensors files to put beside it, each with a name under which ``value`` is to say where it is.
                Other bytes have another file, so that an earlier one is there as long as the manifest speaks of it.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        folder, earlier = self.artifact.path, self.artifact.manifest.get(key, {})
        for name, data in tensors.items():
            digest = hashlib.sha256(data).hexdigest()
            file = f"{name}.{digest[:12]}.safetensors"
            value = value | {name: {"file": file, "bytes": len(data), "sha256": digest}}
            _replace(folder / file, data)
        text = json.dumps(self.artifact.manifest | {key: value}, indent=1, allow_nan=False) + "\n"
        _replace(folder / MANIFEST, text.encode())
        for name in tensors:
            if name in earlier and earlier[name] != value[name]:
                (folder / earlier[name]["file"]).unlink(missing_ok=True)


def _replace(file: Path, data: bytes) -> None:
    partial = file.with_name(f"{file.name}.partial")
    with disk_errors(file, len(data)):
        try:
            with partial.open("wb") as opened:
                opened.write(data)
                opened.flush()
                os.fsync(opened.fileno())
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def finished(options: Mapping[str, Any], files: Mapping[str, Path | None]) -> bool:
    """Whether ``--out`` of ``convert``'s ``options`` is an artifact that is to stay as it is, and is what they say.
    ``files``, by option, are read too.

    Raises:
        CheckpointError: it is damaged.
        ConfigError: it is of other precisions, or rotated or smoothed otherwise, than the options say.
        InputError: ``--out`` is, lies in, or holds one of ``files``.
    """
    check_inputs(options["out"], files.items())
    place = real(options["out"])
    if options["overwrite"] or not (place / MANIFEST).is_file():
        return False
    Asked(**{field.name: options[field.name] for field in dataclasses.fields(Asked)}).check(Artifact.open(place))
    return True


@contextlib.contextmanager
def amending(path: Path, options: Mapping[str, Any], *, check: bool) -> Iterator[tuple[Amendable, Original]]:
    """Keep everybody else from reading, writing or amending the artifact in ``path``, and open what it was made from,
    as ``options`` of ``convert`` name it; whether that is true is looked at where ``check`` is set.

    Raises:
        CheckpointError: no artifact, or a damaged one; a source that cannot be used, or another one.
        InputError: another process reads or writes it.
        OutputError: nothing can be written there.
    """
    place = real(path)
    Artifact.open(place)
    takes_files(place, f"the manifest of {path}")
    with writing(place, "lowvram convert --calibrate"), replacing(place / MANIFEST):
        artifact, original = Artifact.open(place), original_as(options)
        if check:
            original.check(artifact)
        yield Amendable(artifact), original
