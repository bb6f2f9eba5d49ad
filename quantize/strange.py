"""Strange files that often lie where weights should be: said before anything tries to read it."""

from __future__ import annotations

import re
from pathlib import Path

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.absent import elsewhere

# What browsers (Chrome, Firefox), aria2, wget-like tools and Hugging Face's client call a file until it is whole.
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")
_LFS = b"version https://git-lfs.github.com/spec/"
_PAGE = re.compile(rb"\s*(?:<!doctype html|<html|<head|<\?xml)", re.IGNORECASE)


def refuse_strange(path: Path) -> None:
    """Raises: CheckpointError where a file is missing, still being fetched, a Git LFS pointer or a web page."""
    if path.name.endswith(UNFINISHED):
        raise CheckpointError(f"{path} is an unfinished download; expected the whole file: let it finish")
    if not path.is_file():
        raise CheckpointError(_missing(path))
    if path.with_name(path.name + ".aria2").is_file():  # aria2 writes under the final name and keeps its notes beside
        raise CheckpointError(f"{path} is an unfinished download ({path.name}.aria2 lies beside it); let it finish")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    if head.startswith(_LFS):
        size = re.search(rb"\nsize (\d+)", head)
        whole = f" of a file of {int(size[1])} bytes" if size else ""
        raise CheckpointError(
            f"{path} is a Git LFS pointer{whole}, not the file; run git lfs pull in its folder, or fetch the file"
        )
    if _PAGE.match(head):
        raise CheckpointError(
            f"{path} is a web page, not weights: a download that ended at a login or error page; fetch the file itself"
        )


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder; expected a file of weights: name the file in it"
    if path.is_symlink():
        return (
            f"{path} is missing: it is a link to {path.readlink()}, which is not there (an unfinished download, or a "
            "cache that was cleaned); fetch the checkpoint again"
        )
    for ending in UNFINISHED:
        if path.with_name(path.name + ending).is_file():
            return f"{path} is missing: {path.name}{ending} is an unfinished download of it; let it finish"
    return f"{path} {elsewhere(path) or 'is missing; fetch the checkpoint again'}"
