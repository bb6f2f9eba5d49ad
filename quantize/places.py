"""Places on disks: whether two names lead to one of them, and whether something can be written there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lowvram_kernels.errors import InputError, OutputError

# What is unfinished, and locks, are called after the file itself, with as many bytes more at the most.
_BESIDE = len(".replaced-12345678.")


def real(path: Path) -> Path:
    """Where a symbolic link leads, so that its target is written and the link stays."""
    return Path(os.path.realpath(path))


def same(a: Path, b: Path) -> bool:
    """Whether two names lead to one file or folder: through links of both kinds, dots, and letters of another case on
    disks that do not tell them apart; also where one of them, or none, is there yet."""
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):
        one, other = real(a), real(b)
    if one == other:
        return True
    # Neither is there, or one: then they are one only if the disk takes their names for one.
    alike = one.name != other.name and one.name.casefold() == other.name.casefold()
    return alike and same(one.parent, other.parent) and _folds_case(one.parent)


def within(path: Path, folder: Path) -> bool:
    """Whether ``path`` lies somewhere below ``folder``, by the same rules."""
    return any(same(above, folder) for above in real(path).parents)


def takes_files(folder: Path, what: str) -> None:
    """Try it: rights alone do not tell of read-only disks, nor of full ones.

    Raises:
        OutputError: nothing can be made in ``folder``, so ``what`` cannot.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"{what} cannot be written: nothing can be made in {folder} ({error.strerror or error}); choose another "
            "folder"
        ) from error


def takes_name(path: Path, what: str) -> None:
    """Raises: InputError where a name of ``path``, ``what`` in messages, is too long for the disk."""
    there = nearest_folder(path.parent)
    lengths = [len(os.fsencode(part)) for part in path.relative_to(there).parts]
    lengths[-1] += _BESIDE
    if max(lengths) > os.pathconf(there, "PC_NAME_MAX"):
        raise InputError(f"{what} cannot be written: its name is too long for this disk; choose a shorter one")


def nearest_folder(folder: Path) -> Path:
    """The first of ``folder`` and what it lies in that is there, whatever it is."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def _folds_case(folder: Path) -> bool:
    """Whether the disk of ``folder`` takes names that differ in case only for one; False where it cannot be tried."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="lowvram-case-") as file:
            return Path(file.name).with_name(Path(file.name).name.upper()).exists()
    except OSError:
        return False
