"""Files of a hub on this disk: what is there already is checked, what is begun goes on, what is wrong does not stay."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowvram.byte_sizes import gib
from lowvram.fetch.hub import Hub, Listing, Published
from lowvram_kernels.errors import FetchError, InputError, OutputError
from lowvram_quantize.places import nearest_folder

log = logging.getLogger("lowvram.plan")
RECORD = ".lowvram-fetch.json"
"""In each folder: which of its files were checked, and when they had been written."""
_PIECE = 16 << 20


class Folder:
    """Where a repository's files go."""

    def __init__(self, parent: Path, listing: Listing) -> None:
        self.path, self.listing = parent / listing.source.folder, listing
        self._checked: dict[str, Any] = _read(self.path / RECORD)

    def place(self, file: Published) -> Path:
        return self.path / file.name

    def begun(self, file: Published) -> Path:
        """What has come of it; the name says of which bytes, so that another edition's are not taken for them."""
        place = self.place(file)
        return place.with_name(f"{place.name}.{file.checksum[:12]}.partial")

    def done(self, file: Published) -> bool:
        """Whether a file is here and known to be the published one.

        Raises:
            InputError: another file has its name.
        """
        place = self.place(file)
        if not os.path.lexists(place):
            return False
        facts = place.stat()
        if self._checked.get(file.name) == [file.checksum, facts.st_size, facts.st_mtime_ns]:
            return True
        log.info("%s is there already and is checked", place)
        if facts.st_size == file.size and checksum(place, file) == file.checksum:
            self._note(file)
            return True
        raise InputError(
            f"{place} is there, and is not the published file of {file.size} bytes; move it away, or name another --out"
        )

    def missing(self) -> list[Published]:
        """Files that are not here yet."""
        return [file for file in self.listing.files if not self.done(file)]

    def to_come(self, file: Published) -> int:
        """Bytes of a file that are not here yet."""
        begun = self.begun(file)
        there = begun.stat().st_size if begun.is_file() else 0
        return file.size - there if there <= file.size else file.size

    def fetch(self, hub: Hub, file: Published) -> None:
        """Get it, or the rest of it; it has its name only when its checksum is right.

        Raises:
            FetchError, InputError: as of ``Hub.read``; or other bytes came than were published.
            OutputError: no room, or nothing can be written here.
        """
        place, begun = self.place(file), self.begun(file)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with begun.open("ab") as into:
                if into.tell() > file.size:
                    into.seek(into.truncate(0))
                done = into.tell()
                if done:
                    log.info("%s goes on at %s of %s", file.name, gib(done), gib(file.size))
                if done < file.size:
                    hub.read(self.listing, file, into, done)
            self._check(begun, file)
            os.replace(begun, place)
            self._note(file)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            advice = "free some space and run again, it goes on where it was" if full else "check the folder"
            raise OutputError(f"{place} cannot be written ({error.strerror or error}); {advice}") from error

    def _check(self, begun: Path, file: Published) -> None:
        if (size := begun.stat().st_size) == file.size and checksum(begun, file) == file.checksum:
            return
        begun.unlink()
        raise FetchError(
            f"{self.listing.source.repo}'s {file.name} came with other bytes than were published ({size} of "
            f"{file.size} bytes, or another checksum), and was removed; run again"
        )

    def _note(self, file: Published) -> None:
        facts = self.place(file).stat()
        self._checked[file.name] = [file.checksum, facts.st_size, facts.st_mtime_ns]
        record = self.path / RECORD
        partial = record.with_name(f"{RECORD}.partial")
        partial.write_text(json.dumps(self._checked, indent=1) + "\n", encoding="utf-8")
        partial.replace(record)


def check_room(folders: Sequence[Folder], parent: Path) -> None:
    """Raises: OutputError where the disk has not the room for what is to come."""
    wanted = sum(folder.to_come(file) for folder in folders for file in folder.missing())
    free = shutil.disk_usage(nearest_folder(parent.absolute())).free
    if wanted > free:
        raise OutputError(
            f"{parent} has {gib(free)} free, and {gib(wanted)} are to come; free some space, or name another --out"
        )


def checksum(path: Path, file: Published) -> str:
    """Of the bytes at ``path``, by the rule of ``file``."""
    begin = b"blob %d\0" % path.stat().st_size if file.git else b""
    # What git names a file by is no secret's guard.
    digest = hashlib.sha1(begin, usedforsecurity=False) if file.git else hashlib.sha256()
    with path.open("rb") as source:
        while piece := source.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _read(record: Path) -> dict[str, Any]:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
