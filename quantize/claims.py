"""Claims of processes on a path that they write or read, gone with the process however that ends.

A writer's claim is an ``flock`` on a file beside the target, which says who holds it; a reader's is a shared one on a
file that the target has anyway, so that it needs no right to write there.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lowvram_kernels.errors import InputError, OutputError

log = logging.getLogger(__name__)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EROFS)


def lock_file(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


@contextlib.contextmanager
def writing(target: Path, what: str) -> Iterator[None]:
    """Be the only process that makes ``target``; ``what`` says in a word what it is making.

    Raises:
        InputError: another process does so already; which one, since when.
        OutputError: nothing can be written beside ``target``.
    """
    path = lock_file(target)
    descriptor = _opened_exclusively(path, target)
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "what": what}
        holder["since"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        # While it is held: whoever waits for it sees that its file has gone, and takes a new one.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Keep what ``file`` belongs to from being replaced while it is read.

    Raises:
        InputError: it is being replaced right now.
    """
    with _locked(file, fcntl.LOCK_SH, f"{file.parent} is being replaced by another run; wait for it"):
        yield


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[None]:
    """Keep everybody else from reading what ``file`` belongs to.

    Raises:
        InputError: somebody reads it.
    """
    advice = "wait for it, or choose another name for the new one"
    with _locked(file, fcntl.LOCK_EX, f"{file.parent} is in use by a run that reads it; {advice}"):
        yield


def _opened_exclusively(path: Path, target: Path) -> int:
    while True:
        try:  # never through a link: what it leads to is not ours
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise OutputError(
                f"{target} cannot be written: {path} cannot be made beside it ({error.strerror}); choose another place"
            ) from error
        try:
            if not _try(descriptor, fcntl.LOCK_EX, path):
                raise InputError(
                    f"{target} is being written by {_holder(descriptor)}; wait for it, or choose another name"
                )
            if _is(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has just ended and taken the file away


@contextlib.contextmanager
def _locked(file: Path, kind: int, refusal: str) -> Iterator[None]:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not _try(descriptor, kind, file):
            raise InputError(refusal)
        yield
    finally:
        os.close(descriptor)


def _try(descriptor: int, kind: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        log.warning("%s: this file system has no locks (%s): start no second run on it meanwhile", path, error.strerror)
    return True


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} ({holder['what']}, since {holder['since']})"
    except (ValueError, KeyError, TypeError):  # it has only just taken it
        return "another process"
