"""Jobs: what is to be made of an entry of a list, where, and whether it is made already."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import av

from lowvram.outputs import check_folder
from lowvram.request import Request
from lowvram_kernels.errors import InputError
from lowvram_quantize.places import real, within
from lowvram_quantize.slabs import sha256_file

KEY = "job"
"""Under which a report says of which job it is."""
_PART_LENGTH = 48
_READ = {"--image": "the portrait", "--audio": "the voice", "--mask": "a mask", "--pose_video": "the pose video"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """An entry of a list: which one, from 1 on, what it is called, what is to be made and where. ``wrong`` says why it
    cannot be, "" where it can; ``drawn``: any seed will do; ``named``: the list says what it is called."""

    place: int
    name: str
    request: Request | None = None
    video: Path | None = None
    wrong: str = ""
    drawn: bool = False
    named: bool = False

    @property
    def report(self) -> Path:
        """Beside the video."""
        assert self.video is not None
        return self.video.with_suffix(".json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class There:
    """What lies where a job's video is to be: nothing, its own video, one that is known to be of another job or of
    other settings, or something else. ``words`` say it."""

    state: Literal["nothing", "done", "changed", "foreign"]
    words: str = ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def name_of(request: Request, given: str) -> str:
    """What a job's files are called: by the name that it was given, or by those of its portrait and voice."""
    parts = ("+".join(path.stem for path in paths)[:_PART_LENGTH] for paths in (request.portraits, request.voices))
    words = given or "_".join(parts)
    return re.sub(r"[^\w.+-]+", "_", words).strip("._") or "job"


def give_places(jobs: Sequence[Job], folder: Path, beside: dict[str, Any]) -> list[Job]:
    """The same jobs, each with a place in ``folder`` where it has none yet: by its name where the list says one, by
    what lies there where that is its own video, and else by a name that no other has. So a list may be mended, or get
    longer, and what is made of it stays where it is."""
    placed = {job.place: job for job in jobs}
    used = {job.video.stem.casefold() for job in jobs if job.video is not None}
    waiting = [job for job in jobs if job.request is not None and job.video is None]

    def put(job: Job, name: str) -> None:
        used.add(name.casefold())
        placed[job.place] = dataclasses.replace(job, name=name, video=folder / f"{name}.mp4")

    for job in (each for each in waiting if each.named):
        put(job, _free(job.name, used))
    loose = [job for job in waiting if not job.named]
    if loose:
        made = _made(folder)
        for job in loose:
            own = (name for name in made.get(_known(job, beside), ()) if name.casefold() not in used)
            if (name := next(own, None)) is not None:
                put(job, name)
        for job in loose:
            if placed[job.place].video is None:
                put(job, _free(job.name, used))
    return [placed[job.place] for job in jobs]


def _free(name: str, used: set[str]) -> str:
    """The name, or numbered where another has it: apart on disks that fold case, too."""
    numbered = (f"{name}_{count}" for count in itertools.count(2))  # segments have "-"
    return next(each for each in itertools.chain([name], numbered) if each.casefold() not in used)


def _made(folder: Path) -> dict[str, list[str]]:
    """Names of videos there by what they were made of, with the seed and without."""
    found: dict[str, list[str]] = {}
    for report in sorted(folder.glob("*.json")):
        if report.name != "results.json" and isinstance(record := _report(report).get(KEY), dict):
            for drawn in (False, True):
                found.setdefault(_as_key(record, drawn), []).append(report.stem)
    return found


def _known(job: Job, beside: dict[str, Any]) -> str:
    try:
        return _as_key(record_of(job, beside), job.drawn)
    except InputError:  # said when it is looked at
        return ""


def _as_key(record: dict[str, Any], drawn: bool) -> str:
    return json.dumps(record | ({"base_seed": None} if drawn else {}), sort_keys=True)


def settle_places(jobs: Sequence[Job], others: dict[str, Path]) -> list[Job]:
    """The same jobs; those with something wrong whose files would be another job's, or one that is read, or that cannot
    be written at all. ``others`` are files and folders that are read or written beside the jobs', by what they are."""
    taken = {_key(path): what for what, path in others.items()}
    for job in jobs:
        if job.request is not None:
            for option, path in job.request.files.items():
                taken[_key(path)] = f"{_READ[option.partition(',')[0]]} of job {job.place}"
    return [job if job.wrong or job.video is None else _placed(job, taken, others) for job in jobs]


def _placed(job: Job, taken: dict[str, str], others: dict[str, Path]) -> Job:
    assert job.video is not None
    try:
        if job.video.suffix.lower() != ".mp4":
            raise InputError(f"out is {job.video}; expected a name that ends in .mp4")
        for path in (job.video, job.report):
            if (what := taken.get(_key(path))) is not None:
                raise InputError(f"{path} is {what} too: one would destroy the other; give another out or name")
        for what, folder in others.items():
            if folder.is_dir() and within(job.video, folder):
                raise InputError(f"out is {job.video}, inside {what}; name a file in another folder")
        check_folder("out", job.video.parent, make=True)
    except InputError as error:
        return dataclasses.replace(job, wrong=str(error))
    taken |= {_key(path): f"what job {job.place} writes" for path in (job.video, job.report)}
    return job


def _key(path: Path) -> str:
    return str(real(path)).casefold()


def record_of(job: Job, beside: dict[str, Any]) -> dict[str, Any]:
    """All that a video depends on, as its report keeps it: settings, checksums of its files, a list of
    them where one person has not all, and what is the same for all jobs, ``beside``.

    Raises:
        InputError: a file that cannot be read.
    """
    assert job.request is not None
    request = job.request
    paths = {"image": request.portraits, "audio": request.voices, "masks": request.masks}
    paths["pose_video"] = () if request.pose_video is None else (request.pose_video,)
    settings = {name: value for name, value in dataclasses.asdict(request).items() if name not in paths}
    sums = {name: [checksum(path) for path in several] for name, several in paths.items()}
    # One alone, and no word of what is not there: so are records that know of one person.
    files = {f"{name}_sha256": found[0] if len(found) == 1 else found for name, found in sums.items() if found}
    record: dict[str, Any] = json.loads(json.dumps(settings | files | beside))
    return record


def checksum(path: Path) -> str:
    """Of a file's bytes, made once for each time that it is written.

    Raises:
        InputError: it cannot be read.
    """
    try:
        facts = path.stat()
        return _checksum(path, facts.st_mtime_ns, facts.st_size)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path} cannot be read ({said}); expected a file, check the path") from error


@functools.lru_cache(maxsize=4096)
def _checksum(path: Path, _time: int, _size: int) -> str:
    return sha256_file(path)


def look(job: Job, wanted: dict[str, Any]) -> There:
    """What lies where a job's video is to be; its own one is known by the report beside it, and by its frames."""
    assert job.video is not None
    video, report = job.video, job.report
    if not video.exists() and not report.exists():
        return There(state="nothing")
    found = _report(report)
    made = found.get(KEY)
    if not isinstance(made, dict):
        here = video if video.exists() else report
        return There(
            state="foreign", words=f"{here} is there already, and no report beside it says that it is this job"
        )
    ignored = {"base_seed"} if job.drawn else set()
    changed = sorted(
        name.removesuffix("_sha256").replace("artifact", "model")
        for name in (wanted.keys() | made.keys()) - ignored
        if wanted.get(name) != made.get(name)
    )
    if changed:
        return There(state="changed", words=f"{video} was made with another {', '.join(changed)}", facts=found)
    if not video.exists():
        return There(state="nothing", facts=found)
    if (frames := _frames(video)) != found.get("frames_written") and not found.get("fragmented"):
        there = "cannot be read" if frames is None else f"has {frames} frames"
        said = f"{video} {there}, and its report says {found.get('frames_written')}"
        return There(state="changed", words=said, facts=found)
    return There(state="done", facts=found)


def _report(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _frames(video: Path) -> int | None:
    """As its index has them; None of a file that is no video."""
    try:
        with av.open(f"file:{video.absolute()}", options={"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2"}) as container:
            return container.streams.video[0].frames
    except (av.FFmpegError, OSError, IndexError):
        return None
