"""Writing a component slab by slab at a planned layout, so that an interrupted run goes on where it was.

A journal beside the file lists the finished slabs; it starts with a fingerprint of everything that decides the bytes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lowvram_kernels.errors import OutputError
from lowvram_quantize.slabs import Slab, header_bytes, sha256_range

Tensor = torch.Tensor
log = logging.getLogger(__name__)


@contextlib.contextmanager
def disk_errors(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turn a failed write into an OutputError with bytes needed and bytes free."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        advice = "free some space and run again: it goes on where it was" if full else "check the folder's permissions"
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}): {needed_bytes} bytes needed, {free} free; {advice}"
        ) from error


class SlabWriter:
    """Writes one component's safetensors file; a context manager.

    ``finished`` maps each slab that is on the disk to what was noted for it: its SHA-256 and the caller's facts.
    """

    def __init__(self, path: Path, slabs: list[Slab], metadata: dict[str, str], fingerprint: str):
        self.path, self._slabs = path, {slab.name: slab for slab in slabs}
        self._journal_path = path.with_name(path.name + ".journal")
        self._header = header_bytes(slabs, metadata)
        self.nbytes = len(self._header) + sum(slab.nbytes for slab in slabs)
        self.finished: dict[str, dict[str, Any]] = {}
        with disk_errors(path, self.nbytes):
            kept = self._resume(fingerprint)
            self._file: BinaryIO = path.open("r+b" if path.exists() else "w+b", buffering=0)
            self._journal = self._journal_path.open("a", encoding="utf-8")
            self._journal.truncate(kept)
            if not self.finished:
                self._start(fingerprint)

    @property
    def header_nbytes(self) -> int:
        return len(self._header)

    def _resume(self, fingerprint: str) -> int:
        """Find what is finished; returns how many bytes of the journal are sound."""
        if not self._journal_path.exists() or not self.path.exists():
            return 0
        lines = self._journal_path.read_bytes().splitlines(keepends=True)
        if not lines or lines[0] != f"{fingerprint}\n".encode() or not self._is_laid_out():
            log.warning(
                "%s was begun from other files, with other options or by a lowvram that lays it out otherwise: "
                "starting over",
                self.path,
            )
            return 0
        kept = len(lines[0])
        for line in lines[1:]:
            if (note := _note(line)) is None:  # cut short
                break
            kept += len(line)
            slab = self._slabs[note["slab"]]
            if sha256_range(self.path, len(self._header) + slab.offset, slab.nbytes) == note["sha256"]:
                self.finished[slab.name] = note
        log.info("%s: %d of %d slabs are there already", self.path, len(self.finished), len(self._slabs))
        return kept

    def _is_laid_out(self) -> bool:
        with self.path.open("rb") as file:
            return self.path.stat().st_size == self.nbytes and file.read(len(self._header)) == self._header

    def _start(self, fingerprint: str) -> None:
        self._file.truncate(0)
        self._file.write(self._header)
        # The whole size at once: the padding comes with it, and a disk that is too small is known now.
        os.posix_fallocate(self._file.fileno(), 0, self.nbytes)
        self._journal.truncate(0)
        self._journal.write(fingerprint + "\n")
        self._journal.flush()

    def write(self, slab: str, offset: int, values: Tensor) -> None:
        """Write a tensor's bytes ``offset`` bytes behind the slab's start.

        Raises:
            OutputError: the disk is full, or the file cannot be written.
        """
        raw = memoryview(values.contiguous().flatten().view(torch.uint8).numpy().data)
        with disk_errors(self.path, self.nbytes):
            self._file.seek(len(self._header) + self._slabs[slab].offset + offset)
            while raw.nbytes:
                raw = raw[self._file.write(raw) :]

    def finish(self, slab: str, **facts: Any) -> None:
        """Note that a slab is complete."""
        found = self._slabs[slab]
        digest = sha256_range(self.path, len(self._header) + found.offset, found.nbytes)
        note = {"slab": slab, "sha256": digest, **facts}
        self.finished[slab] = note
        with disk_errors(self.path, self.nbytes):
            self._journal.write(json.dumps(note) + "\n")
            self._journal.flush()

    def close(self) -> None:
        with disk_errors(self.path, self.nbytes):
            self._journal.close()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> SlabWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _note(line: bytes) -> dict[str, Any] | None:
    """A finished slab's line of the journal; None where it is not whole."""
    try:
        note = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return note if isinstance(note, dict) else None
