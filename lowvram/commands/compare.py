"""Commands ``compare`` and ``compare record``: two files as they are, two artifacts to be run first on the same input,
or one against what was recorded of a baseline."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lowvram.commands.shared_options import (
    either_spelling,
    make_request,
    open_pipeline,
    prompt_file,
    read_prompt,
    seconds_of,
)
from lowvram.compare.comparison import compare
from lowvram.compare.same_model import check_model
from lowvram.compare.sources import REFERENCE, open_source
from lowvram.outputs import Outputs, check_apart, check_file, check_folder
from lowvram.parallel.rank_env import RankEnv
from lowvram.request import Request
from lowvram_kernels.errors import ConfigError, InputError, OutputError
from lowvram_quantize.claims import reading
from lowvram_quantize.format import Artifact
from lowvram_quantize.slabs import sha256_file

if TYPE_CHECKING:
    from lowvram.compare.reference import Reference
    from lowvram.compare.result import Comparison

# What a reference was made with, of one person. How a candidate runs is said anew, and when it decodes is part of that.
_RECORDED = {field.name for field in dataclasses.fields(Request)} - {"online_decode", "masks", "pose_video"}
_OF_FILES = {"a", "b", "as_json", "fail_under", "html"}


def compared(
    a: Path | None,
    b: Path | None,
    options: dict[str, Any],
    scratch: Callable[[], Path],
    held: contextlib.ExitStack,
) -> Comparison:
    """Compare what ``options`` of the command name, by the names of their parameters; what is run for it is made in
    ``--out-dir`` or in a folder that ``scratch`` makes. What has to stay as it is until the comparison has been shown
    is kept so by ``held``.

    Raises:
        ClickException: options that do not go together.
        LowvramError: an input that cannot be used, or a run that failed.
    """
    if options["reference"] is not None:
        return _against_reference(a, b, options, scratch, held)
    if options["model"] is not None or options["baseline"] is not None:
        return _run_both(a, b, options, scratch)
    if a is None or b is None:
        raise click.UsageError(
            "give two files to compare, or --model and --baseline to run both, or --model and --reference"
        )
    _refuse_run_options()
    others: dict[str, Path] = {}
    if options["html"] is not None:
        for name, path in (("A", a), ("B", b)):
            others |= {f"{file.name} of {name}": file for file in open_source(path).files}
    _check_page(options, others)
    return compare(a, b)


def record_as_asked(options: dict[str, Any]) -> Path:
    """Record a reference; returns its folder.

    Raises:
        LowvramError: an option that cannot be used, or a run that failed.
    """
    from lowvram.compare.record import check_reference, record_reference

    _alone()
    _refuse_quality_loss(options)
    request, out = make_request(options), options["out"]
    check_reference(out, _inputs(options), overwrite=options["overwrite"])
    return record_reference(
        open_pipeline(options), request, out, overwrite=options["overwrite"], quiet=options["quiet"]
    )


def _run_both(a: Path | None, b: Path | None, options: dict[str, Any], scratch: Callable[[], Path]) -> Comparison:
    from lowvram.compare.scoring import TEACHER_FORCED_BLOCKS, score_pair

    needed = ("model", "baseline", "image", "audio", "prompt")
    if missing := [f"--{name}" for name in needed if options[name] is None]:
        raise click.UsageError(f"to run both, {', '.join(missing)} is missing")
    if a is not None or b is not None:
        raise click.UsageError("give either two files, or --model and --baseline; not both")
    _alone()
    _refuse_quality_loss(options)
    _refuse_idle_overwrite(options)
    blocks = _teacher_forced_blocks(options) or TEACHER_FORCED_BLOCKS
    folder, places = _places(options, scratch, "model", "baseline")
    request, inputs = make_request(options), _inputs(options)
    _check_page(options, inputs, *places)
    check_folder("--out-dir", folder, make=False)
    for outputs in places:  # of both, before the first of them runs
        outputs.check(inputs)
    baseline = options | {"model": options["baseline"], "kv": options["baseline_kv"] or options["kv"]}
    pair = places[0], places[1]
    pipelines = open_pipeline(options), open_pipeline(baseline)
    with _room(options):
        return score_pair(*pipelines, request, pair, scratch(), blocks=blocks, quiet=options["quiet"])


def _against_reference(
    a: Path | None,
    b: Path | None,
    options: dict[str, Any],
    scratch: Callable[[], Path],
    held: contextlib.ExitStack,
) -> Comparison:
    from lowvram.compare.reference import Reference
    from lowvram.compare.scoring import score

    if a is not None or b is not None:
        raise click.UsageError("give either two files, or --model and --reference; not both")
    if taken := [f"--{name}" for name in ("baseline", "baseline-kv") if options[name.replace("-", "_")] is not None]:
        raise click.UsageError(f"{', '.join(taken)}: the reference is the baseline; leave them out")
    if options["model"] is None:
        raise click.UsageError("--model is missing: which artifact is to be scored against the reference?")
    _alone()
    _refuse_quality_loss(options)
    _refuse_idle_overwrite(options)
    blocks = _teacher_forced_blocks(options)
    folder, (outputs,) = _places(options, scratch, "model")
    inputs = _inputs(options) | {"--reference": options["reference"]}
    _check_page(options, inputs, outputs)
    check_folder("--out-dir", folder, make=False)
    outputs.check(inputs)
    reference = Reference.read(options["reference"])
    held.enter_context(reading(reference.path / REFERENCE))
    _refuse_contradictions(reference, options)
    dit, name = reference.facts["artifact"]["dit"], f"the reference {reference.path}"
    check_model(Artifact.open(options["model"]), dit, name)
    reference.verify()
    candidate, how = open_pipeline(options), {"online_decode": options["enable_online_decode"]}
    with _room(options):
        return score(candidate, reference, outputs, scratch(), blocks=blocks, quiet=options["quiet"], **how)


@contextlib.contextmanager
def _room(options: dict[str, Any]) -> Iterator[None]:
    """Says, where something cannot be written, which option has to name another place: blocks lie in a folder that
    nobody has named."""
    try:
        yield
    except OutputError as error:
        here = "--out-dir" if options["out_dir"] else "TMPDIR, as no --out-dir was given"
        raise OutputError(f"{error}; all that is run lies in the folder of {here}") from error


def _alone() -> None:
    if (env := RankEnv.from_environ(os.environ)) is not None and env.world_size > 1:
        raise ConfigError(f"compare runs models on one rank, and here are {env.world_size}; start it without torchrun")


def _refuse_quality_loss(options: dict[str, Any]) -> None:
    if options["allow_quality_loss"]:
        raise ConfigError("--allow-quality-loss would change what is compared; leave it out")


def _refuse_idle_overwrite(options: dict[str, Any]) -> None:
    if options["overwrite"] and options["out_dir"] is None and options["html"] is None:
        raise click.UsageError("--overwrite has an effect with --out-dir or --html only; leave it out")


def _teacher_forced_blocks(options: dict[str, Any]) -> int | None:
    blocks: int | None = options["teacher_forced_blocks"]
    if blocks is not None and blocks < 1:
        raise ConfigError(f"--teacher-forced-blocks is {blocks}; expected 1 or more, or none for the default")
    return blocks


def _given() -> list[str]:
    """Parameters that stand on the command line."""
    context = click.get_current_context()
    return [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]


def _refuse_run_options() -> None:
    """Two files are compared as they are: an option that says how to run would do nothing."""
    given = _given()
    allowed = _OF_FILES | ({"overwrite"} if "html" in given else set())
    if beyond := sorted(set(given) - allowed):
        names = ", ".join(f"--{either_spelling(name)}" for name in beyond)
        raise click.UsageError(f"{names} have an effect with --model only, which runs what is compared; leave them out")


def _refuse_contradictions(reference: Reference, options: dict[str, Any]) -> None:
    """What was given may say again what the reference was made with, and nothing else.

    Raises:
        ConfigError: what says something else.
    """
    request, files = reference.request, reference.facts["files"]
    wrong = []
    for name in (name for name in _given() if name in _RECORDED):
        given, recorded = options[name], getattr(request, name)
        if name in ("image", "audio"):
            same = _checksum(given) == files[recorded.name]["sha256"]
        elif name in ("audio_start", "audio_duration"):
            same = seconds_of(given, f"--{either_spelling(name)}") == recorded
        else:
            same = (read_prompt(given) if name == "prompt" else given) == recorded or given == str(recorded)
        if not same:
            wrong.append(f"--{either_spelling(name)} {given} (recorded: {recorded})")
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}: the reference {reference.path} was made with something else; leave out what it says "
            "itself, or record another"
        )


def _checksum(path: Path) -> str:
    """Raises: InputError where the file cannot be read."""
    try:
        return sha256_file(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; leave it out, the reference has a copy") from error


def _inputs(options: dict[str, Any]) -> dict[str, Path]:
    inputs = {f"--{name}": options[name] for name in ("image", "audio", "model", "baseline") if options.get(name)}
    if options["prompt"] is not None and (file := prompt_file(options["prompt"])) is not None:
        inputs["--prompt"] = file
    return inputs


def _places(options: dict[str, Any], scratch: Callable[[], Path], *names: str) -> tuple[Path, list[Outputs]]:
    """The folder of the runs, and where each of them writes; without a reference a dump too."""
    folder: Path = options["out_dir"] or scratch()
    found = [Outputs.in_folder(folder, name, "--out-dir", overwrite=options["overwrite"]) for name in names]
    if options["reference"] is not None:
        found = [dataclasses.replace(outputs, dump_tensors=None) for outputs in found]
    return folder, found


def _check_page(options: dict[str, Any], others: Mapping[str, Path], *places: Outputs) -> None:
    """Look before the work whether the page can be written.

    Raises:
        InputError: it is one of the files that are read or made, or there already and not to be replaced; A or B cannot
            be opened.
        OutputError: nothing can be written there.
    """
    html = options["html"]
    if html is None:
        return
    made = {name: path for outputs in places for name, path in outputs.named.items()} if options["out_dir"] else {}
    check_apart({"--html": html}, {**others, **made})
    check_file("--html", html, overwrite=options["overwrite"])
