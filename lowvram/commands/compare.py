"""Command ``compare``: two files as they are, or two artifacts to be run first, on the same input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from lowvram.commands.shared_options import make_request, open_pipeline, prompt_file
from lowvram.compare.sources import open_source
from lowvram.outputs import Outputs, check_apart, check_file, check_folder


def refuse_run_options() -> None:
    """Two files are compared as they are: an option that says how to run would do nothing."""
    context = click.get_current_context()
    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    allowed = {"a", "b", "as_json", "fail_under", "html"} | ({"overwrite"} if "html" in given else set())
    if beyond := sorted(set(given) - allowed):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in beyond)
        raise click.UsageError(f"{names} have an effect with --model and --baseline only; leave them out")


def refuse_both_ways(a: Path | None, b: Path | None, options: dict[str, Any]) -> None:
    needed = ("model", "baseline", "image", "audio", "prompt")
    if missing := [f"--{name}" for name in needed if options[name] is None]:
        raise click.UsageError(f"to run both, {', '.join(missing)} is missing")
    if a is not None or b is not None:
        raise click.UsageError("give either two files, or --model and --baseline; not both")


def check_page(html: Path | None, options: dict[str, Any], a: Path | None, b: Path | None) -> None:
    """Look before the work whether the page can be written.

    Raises:
        InputError: it is one of the files that are read or made, or there already and not to be replaced; A or B cannot
            be opened.
        OutputError: nothing can be written there.
    """
    if html is None:
        return
    given = {f"--{name}": options[name] for name in ("image", "audio", "model", "baseline")}
    others = {option: path for option, path in given.items() if path is not None}
    for name, path in (("A", a), ("B", b)):
        if path is not None:
            others |= {f"{file.name} of {name}": file for file in open_source(path).files}
    if options["out_dir"] is not None:
        for outputs in _places(options["out_dir"], options).values():
            others |= outputs.named
    check_apart({"--html": html}, others)
    check_file("--html", html, overwrite=options["overwrite"])


def run_both(folder: Path, options: dict[str, Any]) -> tuple[Path, Path]:
    """Run the model and the baseline into ``folder``; return their reports."""
    from lowvram.infer import infer as run

    check_folder("--out-dir", folder, make=False)
    request = make_request(options)
    inputs = {f"--{name}": options[name] for name in ("image", "audio", "model", "baseline")}
    if (file := prompt_file(options["prompt"])) is not None:
        inputs["--prompt"] = file
    places = _places(folder, options)
    for outputs in places.values():  # of both, before the first of them runs
        outputs.check(inputs)
    reports = []
    for name, outputs in places.items():
        kv = options["baseline_kv"] if name == "baseline" and options["baseline_kv"] else options["kv"]
        run(open_pipeline(options | {"model": options[name], "kv": kv}), request, outputs)
        reports.append(folder / f"{name}.json")
    return reports[0], reports[1]


def _places(folder: Path, options: dict[str, Any]) -> dict[str, Outputs]:
    overwrite = options["overwrite"]
    return {name: Outputs.in_folder(folder, name, "--out-dir", overwrite=overwrite) for name in ("model", "baseline")}
