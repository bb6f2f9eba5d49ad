"""Command ``batch``: a list of jobs, with the command line's options where a job has none of its own."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lowvram.batch.jobs import Job, give_places, name_of, settle_places
from lowvram.batch.lists import Listed, read_list
from lowvram.batch.results import FILES, Results, unfinished
from lowvram.batch.run import Batch
from lowvram.commands.shared_options import DRAWN, make_request, open_pipeline, prompt_file
from lowvram.outputs import Outputs, check_folder
from lowvram_kernels.errors import ConfigError, LowvramError, OutputError
from lowvram_quantize.claims import writing
from lowvram_quantize.format import MANIFEST, Artifact
from lowvram_quantize.slabs import sha256_file

_NEEDED = ("image", "audio", "prompt")


def batch_as_asked(options: dict[str, Any]) -> Results:
    """Make all that can be made of a list. Returns what became of each job.

    Args:
        options: all of ``batch``, by the names of their parameters.

    Raises:
        LowvramError: the list, the model or the folder cannot be used at all; nothing is made.
    """
    path, folder = _one_list(options["jobs"], options["sample_list"]), options["out_dir"]
    _check_cluster(options)
    listed = read_list(path, frozenset(_KINDS))
    artifact = Artifact.open(options["model"])
    check_folder("--out-dir", folder, make=True)
    if (minutes := options["segment_minutes"]) is not None:
        Outputs(video=folder / "any.mp4", segment_minutes=minutes)  # which refuses what cannot be
        if options["allow_quality_loss"]:
            raise ConfigError(
                "--allow-quality-loss may begin a video again, and --segment-minutes goes on with it; leave one out"
            )
    beside = {"artifact_sha256": sha256_file(artifact.path / MANIFEST)} | {n: options[n] for n in ("dtype", "kv")}
    jobs = give_places([_job(each, options, folder) for each in listed], folder, beside)
    others = {"the list": path, "--model": artifact.path, **{name: folder / name for name in FILES}}
    jobs = settle_places(jobs, others)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--out-dir {folder} cannot be made ({error.strerror}); name another") from error
    with writing(folder / FILES[0], "lowvram batch"):
        cut = unfinished(folder, overwrite=options["overwrite"])
        how = {name: options[name] for name in ("overwrite", "quiet", "segment_minutes")}
        batch = Batch(jobs, folder, beside=beside, cut=cut, **how)
        batch.results.facts = {"list": str(path.absolute()), "model": str(artifact.path)}
        batch.look()
        opening = functools.partial(open_pipeline, options, resident=True)
        if options["ray"] is None:
            batch.make(opening)
        elif batch.waiting:
            _make_on_cluster(batch, options | {"model": artifact.path.absolute()})
        else:
            batch.results.save()
    return batch.results


def _check_cluster(options: dict[str, Any]) -> None:
    if (workers := options["workers"]) is not None and (options["ray"] is None or workers < 1):
        raise ConfigError(f"--workers is {workers}; expected 1 or more, with --ray")
    if options["ray"] is not None and options["device"] not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"--device is {options['device']}; with --ray expected auto, cpu or cuda, as each has its own"
        )


def _make_on_cluster(batch: Batch, options: dict[str, Any]) -> None:
    from lowvram.batch.cluster import RayPool, connected
    from lowvram.batch.spread import Spread
    from lowvram.batch.worker import Orders

    orders = Orders(
        open_pipeline=functools.partial(open_pipeline, options, resident=True),
        maker=dataclasses.replace(batch.maker, quiet=True),  # bars of several would be in each other's way
        model=options["model"],
        folder=options["out_dir"].absolute(),
        verbose=logging.getLogger("lowvram").isEnabledFor(logging.INFO),
    )
    with connected(options["ray"]):
        Spread(batch, RayPool(orders, most=options["workers"], cards=options["device"] != "cpu")).make()


def _one_list(jobs: Path | None, sample_list: Path | None) -> Path:
    if (path := jobs or sample_list) is None or (jobs is not None and sample_list is not None):
        raise ConfigError("batch is given no list of jobs, or two; expected one, as lowvram batch jobs.json")
    return path


def _job(listed: Listed, options: dict[str, Any], folder: Path) -> Job:
    name = listed.name or f"job {listed.place}"
    if listed.wrong:
        return Job(place=listed.place, name=name, wrong=f"it {listed.wrong}")
    try:
        own = {setting: _KINDS[setting](setting, value) for setting, value in listed.settings.items()}
        asked = options | own
        missing = [setting for setting in _NEEDED if asked[setting] is None]
        if missing:
            raise ConfigError(f"{', '.join(missing)} missing; expected them in the list, or as options for all jobs")
        prompt_file(asked["prompt"])
        request = make_request(asked)
    except LowvramError as error:
        return Job(place=listed.place, name=name, wrong=" ".join(str(error).split()))
    out = own.get("out")
    return Job(
        place=listed.place,
        name=name_of(request, listed.name),
        request=request,
        video=None if out is None else folder / out,
        drawn=asked["base_seed"] == DRAWN,
        named=bool(listed.name),
    )


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{name} is {value!r}; expected a whole number") from error


def _words(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{name} is {value!r}; expected text, or a number")
    return str(value)


def _switch(name: str, value: Any) -> bool:
    try:
        return bool(click.BOOL.convert(value, None, None))
    except (click.BadParameter, AttributeError) as error:
        raise ConfigError(f"{name} is {value!r}; expected true or false") from error


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ConfigError(f"{name} is {value!r}; expected the path of a file")
    return Path(value)


def _paths(name: str, value: Any) -> tuple[Path, ...]:
    if not isinstance(value, list):
        raise ConfigError(f'{name} is {value!r}; expected the paths of files, as ["left.png", "right.png"]')
    return tuple(_path(name, each) for each in value)


def _euler(name: str, value: Any) -> str:
    if value != "euler":
        raise ConfigError(f"{name} is {value!r}; expected euler, which the model is trained for")
    return "euler"


# What a job may have of its own, and what it becomes.
_KINDS: dict[str, Callable[[str, Any], Any]] = {
    "image": _path,
    "audio": _path,
    "masks": _paths,
    "pose_video": _path,
    "prompt": _words,
    "out": _path,
    "size": _words,
    "upscale": _switch,
    "audio_track": _whole,
    "audio_start": _words,
    "audio_duration": _words,
    "infer_frames": _whole,
    "num_clip": _whole,
    "sample_steps": _whole,
    "sample_solver": _euler,
    "base_seed": _whole,
    "cond_rope_distance": _words,
    "enable_online_decode": _switch,
}
