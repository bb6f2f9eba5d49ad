"""SHA-256 of source files, made of the bytes that a conversion reads anyway.

A checksum wants a file from its first byte to its last, and a conversion reads tensors in the order in which they lie.
What it does not read, as headers, tensors that nobody wants, and what an earlier run has converted, is read here as
soon as the conversion is beyond it. So that no file is read for its checksum alone, those that are known are noted
beside the unfinished artifact, with size and time of the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.slabs import pieces_of
from lowvram_quantize.source import telling
from lowvram_quantize.writer import disk_errors

NOTES = "sources.sha256"
"""Of an unfinished artifact: the checksums that are known."""
# Stretches that wait to be hashed at the most: they are copies of what is read.
_WAITING = 2


class _File:
    """A file as far as it is hashed."""

    def __init__(self, path: Path):
        self.path, self.stat = path, _stat(path)
        self.nbytes, self.position = self.stat[0], 0
        self._digest = hashlib.sha256()

    @property
    def left(self) -> int:
        return self.nbytes - self.position

    def take(self, offset: int, raw: np.ndarray) -> None:
        """Bytes from ``offset`` on; those before it that are not hashed yet are read."""
        self.read_to(offset)
        if 0 <= self.position - offset < raw.size:
            self._digest.update(raw[self.position - offset :].data)
            self.position = offset + raw.size

    def read_to(self, end: int) -> None:
        if end > self.position:
            for piece in pieces_of(self.path, self.position, end - self.position):
                self._digest.update(piece)
            self.position = end

    def hexdigest(self) -> str:
        """Raises: CheckpointError where the file is not what it was when its reading began."""
        if _stat(self.path) != self.stat:
            raise CheckpointError(
                f"{self.path} was changed while it was converted; convert again once it stays as it is"
            )
        return self._digest.hexdigest()


def _stat(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


class SourceDigests:
    """Hashes ``files`` beside what reads them, in a thread of its own; a context manager.

    Args:
        notes: where checksums of whole files are kept for a next run.
    """

    def __init__(self, files: Iterable[Path], notes: Path):
        self._notes, self._known = notes, _read(notes)
        self._files = {file: _File(file) for file in sorted(set(files))}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lowvram-sha256")
        self._room = threading.Semaphore(_WAITING)
        self._last: Future[None] | None = None
        self._failed: BaseException | None = None

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """What tensors read meanwhile is hashed."""
        with telling(self._saw):
            yield

    def _saw(self, path: Path, offset: int, raw: np.ndarray) -> None:
        file = self._files.get(path)
        if self._failed is not None:
            raise self._failed
        if file is None or self._of(file) is not None or offset + raw.size <= file.position:
            return
        # Whoever reads may write to what it has read.
        copy = raw.copy()
        self._room.acquire()
        self._last = self._pool.submit(self._take, file, offset, copy)

    def _take(self, file: _File, offset: int, raw: np.ndarray) -> None:
        try:
            file.take(offset, raw)
            if not file.left:
                self._note(file)
        except BaseException as error:  # told where the next bytes come from
            self._failed = error
        finally:
            self._room.release()

    def finish(self, reading: Callable[[Path, int], None] = lambda file, nbytes: None) -> dict[Path, str]:
        """Checksums of all files, what is left of them read first; ``reading`` is told of a file and its bytes before.

        Raises:
            CheckpointError: a file cannot be read, or is not what it was.
            OutputError: the notes cannot be written.
        """
        if self._last is not None:
            self._last.result()
        if self._failed is not None:
            raise self._failed
        found: dict[Path, str] = {}
        for path, file in self._files.items():
            known = self._of(file)
            if known is None:
                reading(path, file.left)
                file.read_to(file.nbytes)
                known = self._note(file)
            found[path] = known
        return found

    def _of(self, file: _File) -> str | None:
        return self._known.get((str(file.path.absolute()), *file.stat))

    def _note(self, file: _File) -> str:
        digest = file.hexdigest()
        key = (str(file.path.absolute()), *file.stat)
        self._known[key] = digest
        with disk_errors(self._notes, 0), self._notes.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps([*key, digest]) + "\n")
        return digest

    def __enter__(self) -> SourceDigests:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _read(notes: Path) -> dict[tuple[str, int, int], str]:
    """By path, size and time of files. A line that was cut short, with all behind it, counts as none and is cut off."""
    found: dict[tuple[str, int, int], str] = {}
    kept = 0
    lines = notes.read_bytes().splitlines(keepends=True) if notes.exists() else []
    for line in lines:
        try:
            path, nbytes, time, digest = json.loads(line if line.endswith(b"\n") else b"")
            found[path, nbytes, time] = digest
        except (ValueError, TypeError):
            break
        kept += len(line)
    if kept < sum(map(len, lines)):
        with disk_errors(notes, 0):
            os.truncate(notes, kept)
    return found
