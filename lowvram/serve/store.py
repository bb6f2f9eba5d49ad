"""Store of jobs: a folder each, below one folder, read back when the process starts again.

What a client sends has names of our own there; an id is made of 16 hexadecimal digits, and nothing else is ever part of
a path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowvram.outputs import Outputs
from lowvram.serve.errors import Refused
from lowvram.serve.jobs import BROKEN, OPEN_STATES, QUEUED, RUNNING, Job, is_id, new_id
from lowvram_kernels.errors import InputError, OutputError
from lowvram_quantize.claims import writing
from lowvram_quantize.places import real

log = logging.getLogger(__name__)
_JOBS, _INCOMING, _REMOVED, _FACTS = "jobs", "incoming", "removed", "job.json"
COMPARED, UPLOADS = "compared", "uploads"
FILES = ("image", "audio", "image2", "audio2", "mask", "mask2", "pose_video")
"""What may be sent for a job, and how it is called in the job's folder."""
NEEDED = ("image", "audio")
"""Those that have to be."""
BROKEN_OFF = "the process ended while it was made; what was written until then is kept"


@dataclasses.dataclass(frozen=True)
class Place:
    """Files of one job."""

    folder: Path

    @property
    def image(self) -> Path:
        return self.file("image")

    @property
    def audio(self) -> Path:
        return self.file("audio")

    def file(self, name: str) -> Path:
        """That of ``FILES``, which need not be there."""
        return self.folder / name

    def sent(self, *names: str) -> tuple[Path, ...]:
        """Of these the files that are there."""
        return tuple(path for path in map(self.file, names) if path.is_file())

    @property
    def thumbnail(self) -> Path:
        return self.folder / "portrait.jpg"

    @property
    def outputs(self) -> Outputs:
        """Video, report and memory log; ``outputs.partial`` is the video while it is made."""
        names = self.folder / "video.mp4", self.folder / "report.json", self.folder / "memory.csv"
        return Outputs(video=names[0], report=names[1], memory_log=names[2], overwrite=True)

    @property
    def watchable(self) -> Path | None:
        """The video, or what there is of it."""
        outputs = self.outputs
        return next((path for path in (outputs.video, outputs.partial) if path.is_file()), None)


class Store:
    """Jobs in ``folder``, which is made; safe to be called from several threads. Use it as a context manager: while it
    is entered no other process may have the folder.

    Raises:
        InputError: at entry, a file stands there, or another process has the folder.
        OutputError: nothing can be made there; also later, where a disk is full.
    """

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self._jobs: dict[str, Job] = {}
        self._lock = threading.RLock()
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Store:
        try:
            for name in (_JOBS, _INCOMING, _REMOVED, COMPARED, UPLOADS):
                (self.folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"--dir is {self.folder}, where {error.filename} is no folder; name another") from error
        except OSError as error:
            raise OutputError(f"--dir {self.folder} cannot be made ({error.strerror}); name another") from error
        self._held.enter_context(writing(self.folder / _JOBS, "lowvram serve"))
        for name in (_INCOMING, _REMOVED, UPLOADS):  # what an earlier process was in the middle of
            for left in (self.folder / name).iterdir():
                _remove(left)
        self._read_back()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _read_back(self) -> None:
        for folder in (self.folder / _JOBS).iterdir():
            if not is_id(folder.name) or folder.is_symlink():
                continue
            try:
                job = Job.read(json.loads((folder / _FACTS).read_text(encoding="utf-8")), folder.name)
            except (OSError, ValueError) as error:
                log.warning("%s is left out of the history: %s cannot be read (%s)", folder, _FACTS, error)
                continue
            self._jobs[job.id] = job
            if job.state == RUNNING:
                self.change(job.id, state=BROKEN, reason=BROKEN_OFF, ended=time.time())

    @contextlib.contextmanager
    def incoming(self) -> Iterator[Place]:
        """A folder for files that are on their way; it goes, unless ``add`` takes it."""
        place = Place(self.folder / _INCOMING / new_id())
        try:
            place.folder.mkdir(mode=0o700)
            yield place
        except OSError as error:
            raise Refused(
                507, f"the upload cannot be written ({error.strerror}); free some space on the server"
            ) from error
        finally:
            if place.folder.exists():
                _remove(place.folder)

    def add(self, place: Place, settings: dict[str, Any]) -> Job:
        """Take files of ``incoming`` in as a new job, which is queued."""
        with self._lock:
            latest = max((job.created for job in self._jobs.values()), default=0.0)
            # Later than every other, also where the clock was set back: it is the order of the queue.
            job = Job(id=new_id(), created=max(time.time(), latest + 1e-3), settings=settings)
            self._write(job, place.folder)
            place.folder.rename(self.place(job.id).folder)
            self._jobs[job.id] = job
            return job

    def jobs(self) -> list[Job]:
        """All, the oldest first."""
        with self._lock:
            return sorted(self._jobs.values(), key=lambda job: job.created)

    def job(self, name: str) -> Job:
        """Raises: Refused (404): there is none of that id."""
        with self._lock:
            if not is_id(name) or name not in self._jobs:
                raise Refused(404, f"there is no job {name[:40]!r}; GET /api/jobs lists those that are there")
            return self._jobs[name]

    def place(self, name: str) -> Place:
        """Raises: Refused (404): no id."""
        if not is_id(name):
            raise Refused(404, f"there is no job {name[:40]!r}; GET /api/jobs lists those that are there")
        return Place(self.folder / _JOBS / name)

    def waiting(self) -> list[Job]:
        """Those that are queued, in their order."""
        return [job for job in self.jobs() if job.state == QUEUED]

    def change(self, name: str, **changes: Any) -> Job:
        """Change fields of a job, here and in its file."""
        with self._lock:
            job = self.job(name)
            job = dataclasses.replace(job, **changes, version=job.version + 1)
            self._jobs[name] = job
            try:
                self._write(job, self.place(name).folder)
            except OSError as error:  # a full disk must not end the queue; what is known here is right
                log.warning("job %s: its state cannot be written (%s)", name, error.strerror)
            return job

    def remove(self, name: str) -> None:
        """Remove a job with all of its files.

        Raises:
            Refused: (404) there is none; (409) it is queued or running.
        """
        with self._lock:
            job = self.job(name)
            if job.state in OPEN_STATES:
                raise Refused(409, f"job {name} is {job.state}; cancel it first")
            removed = self.folder / _REMOVED / name
            self.place(name).folder.rename(removed)
            del self._jobs[name]
        _remove(removed)
        for page in (self.folder / COMPARED).glob(f"*{name}*"):
            page.unlink(missing_ok=True)

    def _write(self, job: Job, folder: Path) -> None:
        partial = folder / f"{_FACTS}.partial"
        partial.write_text(json.dumps(job.kept(), indent=1), encoding="utf-8")
        os.replace(partial, folder / _FACTS)


def uploaded(path: str | Path, uploads: Path) -> Path:
    """The file itself, where it is one below ``uploads``.

    Raises:
        Refused (422): it is elsewhere, behind a link, or not there.
    """
    try:
        found, folder = real(Path(path)), real(uploads)
        if folder in found.parents and found.is_file():
            return found
    except (OSError, ValueError):  # no name of a file at all
        pass
    raise Refused(422, f"{str(path)[-80:]!r} is no file that was uploaded; upload it")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
