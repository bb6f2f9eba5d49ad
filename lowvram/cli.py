"""The command line: thin above the Python API. Errors become one line on stderr and an exit code here, and only here.

Exit codes: 0 success, 1 a failed run or a missed ``--fail-under``, 2 input that has to change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

# Libraries below look for files on a hub when asked in the wrong way; a run of ours has all it needs on the disk.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
from rich.console import Console
from rich.logging import RichHandler

from lowvram.commands.answers import Answering, before_a_command
from lowvram.commands.batch_options import batch_options
from lowvram.commands.options import (
    compare_options,
    convert_options,
    demo_options,
    infer_options,
    plan_options,
    record_options,
)
from lowvram.commands.serve import serve_options
from lowvram.commands.shared_options import (
    FILE,
    SETTINGS,
)
from lowvram_kernels.errors import LowvramError, OutputError

RECORD = "compare record"


class ErrorsToExitCodes(click.Group):
    """Turns lowvram's errors into one line and an exit code."""

    command_class = Answering

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["arguments"] = list(args)  # as they came, for ranks that are started with the same
        try:
            return super().parse_args(ctx, list(args))
        except click.NoSuchOption as error:
            fail(before_a_command(self, error.option_name, args), 2)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[:2] == RECORD.split():
            args = [RECORD, *args[2:]]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LowvramError as error:
            fail(str(error), error.exit_code)
        except click.UsageError as error:  # in one line, without the page of usage that click puts in front
            fail(error.format_message(), 2)
        except RuntimeError as error:
            import torch  # here, as it takes seconds, and a help page should not

            from lowvram.devices import is_out_of_memory

            if is_out_of_memory(error):
                fail(f"the GPU's memory ran out: {error}; give a smaller --vram-budget, which plans for less", 1)
            if not isinstance(error, torch.AcceleratorError):
                raise
            fail(f"the GPU failed: {error}; what was written before is kept, the card may have to be reset", 1)


def fail(message: str, code: int) -> NoReturn:
    if os.environ.get("LOWVRAM_STARTED") != "1":  # else the process that started this rank says it, once for all ranks
        click.echo("lowvram: error: " + " ".join(message.split()), err=True)
    sys.exit(code)


@click.group(cls=ErrorsToExitCodes, context_settings=SETTINGS)
@click.version_option(package_name="lowvram")
@click.option("-v", "--verbose", is_flag=True, help="Log every stage to stderr.")
def main(verbose: bool) -> None:
    """Talking-avatar video from a portrait, a voice and a prompt, on the cards people own."""
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False, show_time=verbose)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    # It warns at import that it found no kernels to download, on processors with AVX512-BF16; nothing here wants them.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in ("lowvram", "lowvram_quantize", "lowvram_kernels", "lowvram_models"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("lowvram.plan").setLevel(logging.INFO)  # what a run will take is said before it starts


@main.command(context_settings=SETTINGS)
@convert_options
def convert(as_json: bool, **options: Any) -> None:
    """Quantize a published checkpoint once. Interrupted, it goes on where it was when run again."""
    from lowvram.commands.calibrate import take_calibration
    from lowvram.progress import ByteProgress
    from lowvram_quantize.activations import ACTIVATIONS, activations_file
    from lowvram_quantize.amend import amending, finished
    from lowvram_quantize.convert import convert as run
    from lowvram_quantize.format import CALIBRATION
    from lowvram_quantize.inspect import describe
    from lowvram_quantize.measure_on import to_be_measured

    calibration = take_calibration(options)
    amends = calibration is not None and calibration.amends
    asked = options | {"measure_on": calibration.measure_on if calibration else None}
    there = calibration is not None and amends and finished(asked, calibration.files)
    if calibration is not None and calibration.measure_on is not None and not there:
        options["error_parts"] = calibration.parts(*to_be_measured(calibration.measure_on, options))
    if not options["lora"]:
        logging.getLogger(__name__).warning(
            "no --lora: the artifact will hold the base model, which is not the one trained to stream in 4 steps"
        )
    path = options["out"]
    if not there:
        with ByteProgress() as progress:
            path = run(progress=progress.update, **options)
    if calibration is not None and amends:
        with amending(path, options, check=there) as (finished_artifact, original):
            made = calibration.run(finished_artifact.artifact, original)
            files = {ACTIVATIONS: activations_file(made.channel_rms)}
            finished_artifact.amend(CALIBRATION, made.facts, files)
    click.echo(json.dumps(describe(path), indent=1) if as_json else path)


@main.command(context_settings=SETTINGS)
@click.argument("artifact", type=FILE)
@click.option("--verify", is_flag=True, help="Read every byte and compare the checksums.")
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
@click.option("--html", type=FILE, help="Write a page with charts of its parts, and of what a calibration found.")
@click.option("--overwrite", is_flag=True, help="Replace a page of that name.")
def inspect(artifact: Path, verify: bool, as_json: bool, html: Path | None, overwrite: bool) -> None:
    """Print what an artifact holds."""
    from lowvram.calibrate.page import write_page
    from lowvram.outputs import check_apart, check_file
    from lowvram_quantize.inspect import describe, in_words, summary

    if html is not None:
        check_apart({"--html": html}, {"the artifact": artifact})
        check_file("--html", html, overwrite=overwrite)
    elif overwrite:
        raise click.UsageError("--overwrite has an effect with --html only; leave it out")
    facts = describe(artifact, verify=verify)
    if html is not None:
        write_page(facts | {"words": in_words(facts)}, html)
    click.echo(json.dumps(facts, indent=1) if as_json else summary(facts))
    if html is not None and not as_json:
        click.echo(html)


@main.command(context_settings=SETTINGS)
@click.argument("what", type=click.Choice(["live-avatar"]))
@click.option("--out", type=FILE, default=Path("ckpt"), help="Folder for the folders of both repositories.")
@click.option("--revision", multiple=True, metavar="REPO@COMMIT", help="Not as it is now; repeatable.")
@click.option("--yes", is_flag=True, help="Agree to size and licences beforehand.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bars.")
def fetch(what: str, out: Path, revision: tuple[str, ...], yes: bool, quiet: bool) -> None:
    """Fetch the published files that convert reads, from the Hugging Face hub or from $HF_ENDPOINT.

    Size and licences are said first. What is there already is checked, what was interrupted goes on. No other command
    downloads.
    """
    from lowvram.commands.fetch import fetch_as_asked, next_step

    folders = fetch_as_asked(what, out, revisions=revision, yes=yes, quiet=quiet)
    for folder in folders:
        click.echo(folder)
    click.echo(f"next: {next_step(folders)}", err=True)


@main.command(context_settings=SETTINGS)
@infer_options
def infer(**options: Any) -> None:
    """Make an avatar video from a portrait, a voice and a prompt.

    Several GPUs of this machine share the work with --gpus; torchrun starts ranks too, also on several machines.
    """
    from lowvram.commands.infer import infer_as_asked

    for video in infer_as_asked(options, click.get_current_context().meta["arguments"]):
        click.echo(video)


@main.command(context_settings=SETTINGS)
@batch_options
def batch(as_json: bool, **options: Any) -> None:
    """Make the videos of a list, one after the other: JSON, CSV, or YAML, a job in each entry.

    Jobs that cannot be made are explained, and left out; what is made already is not made again. Exits with 1 where a
    job is not made.
    """
    from lowvram.commands.batch import batch_as_asked

    results = batch_as_asked(options)
    if as_json:
        click.echo(json.dumps(results.to_json(), indent=1, allow_nan=False))
    else:
        results.show(Console())
    if not results.good:
        sys.exit(1)


@main.command(context_settings=SETTINGS)
@click.argument("segments", type=FILE, nargs=-1, required=True, metavar="SEGMENT...")
@click.option("--out", type=FILE, required=True, help="MP4 to write.")
@click.option("--unfinished", is_flag=True, help="Also where the take goes on behind the last segment that is here.")
@click.option("--overwrite", is_flag=True, help="Replace a file of that name.")
def join(segments: tuple[Path, ...], out: Path, unfinished: bool, overwrite: bool) -> None:
    """Put the segments of a long video behind one another, without encoding again.

    They are given in their order, all of one take; sound goes over the borders without a seam.
    """
    from lowvram.commands.join import join_as_asked

    click.echo(join_as_asked(segments, out, overwrite=overwrite, unfinished=unfinished))


@main.command(context_settings=SETTINGS)
@serve_options
def serve(**options: Any) -> None:
    """Stay, and make what is asked through a page or an HTTP API, one video after the other.

    Needs the extra: pip install 'lowvram[ui]'. Ctrl-C ends it; what waits then is made by the next one.
    """
    from lowvram.commands.serve import serve_as_asked

    serve_as_asked(options)


@main.command(context_settings=SETTINGS)
@click.argument("files", type=FILE, nargs=-1, required=True, metavar="FILE...")
@click.option("--out", type=FILE, help="SVG to write; default: beside the first file, under its name.")
@click.option("--overwrite", is_flag=True, help="Replace a drawing of that name.")
def report(files: tuple[Path, ...], out: Path | None, overwrite: bool) -> None:
    """Draw memory over time: of runs' reports, of what infer --memory-log wrote, or of nvidia-smi's CSV.

    That is nvidia-smi -i 0 --query-gpu=timestamp,memory.used --format=csv -l 1, of one card.
    """
    from lowvram.memory_log.report import write_drawing
    from lowvram.outputs import check_apart, check_file

    out = out or files[0].with_suffix(".svg")
    check_apart({"--out": out}, {f"file {place}": file for place, file in enumerate(files, 1)})
    check_file("--out", out, overwrite=overwrite)
    write_drawing(files, out)
    click.echo(out)


@main.command(context_settings=SETTINGS)
@click.argument("a", type=FILE, required=False)
@click.argument("b", type=FILE, required=False)
@compare_options
def compare(
    a: Path | None, b: Path | None, as_json: bool, fail_under: tuple[str, ...], html: Path | None, **options: Any
) -> None:
    """Compare A with the baseline B: reports, dumped tensors or videos made from the same seed.

    With --model and --baseline both are run first, on the same portrait, voice, prompt and settings; with --model and
    --reference that model alone, on what was recorded. Then single steps are compared too, each from the baseline's
    latents. A baseline is recorded by lowvram compare record; a file of that name is ./record.
    """
    from lowvram.commands.compare import compared
    from lowvram.compare.page import write_page
    from lowvram.compare.result import parse_fail_under
    from lowvram.compare.tables import print_comparison

    bounds = parse_fail_under(fail_under)
    with contextlib.ExitStack() as stack:
        asked, place = options | {"html": html}, options["out_dir"]
        result = compared(a, b, asked, lambda: stack.enter_context(scratch("compare", place)), stack)
        missed = result.check(bounds)
        if html is not None:
            write_page(result, html, bounds)
        if as_json:
            click.echo(json.dumps(result.to_json(bounds), indent=1, allow_nan=False))
        else:
            print_comparison(result, Console())
    if html is not None and not as_json:
        click.echo(html)
    if missed:
        fail("; ".join(missed), 1)


@main.command(RECORD, context_settings=SETTINGS)
@record_options
def compare_record(**options: Any) -> None:
    """Run a baseline and keep all that other artifacts are scored by, with lowvram compare --reference.

    The folder holds portrait and voice too, and can be taken elsewhere.
    """
    from lowvram.commands.compare import record_as_asked

    click.echo(record_as_asked(options))


@main.command(context_settings=SETTINGS)
@plan_options
def plan(
    model: Path | None, preset: str | None, precision: str | None, as_json: bool, dry: bool, **options: Any
) -> None:
    """Print what would be where, how much memory it takes and how fast it would be. Nothing is loaded.

    Exits with 1 where it does not fit.
    """
    from lowvram.commands.plan import make_plan_request, show_cards, show_plan
    from lowvram_quantize.shape_artifact import write_shape_artifact

    if options["gpu"] == "list":
        show_cards(as_json=as_json)
        return
    asked = make_plan_request(options)
    if model is not None and (preset or precision):
        raise click.UsageError(
            "--preset and --precision stand for a model that is not here: with --model leave them out"
        )
    with scratch("plan") as folder:
        path = model or write_shape_artifact(folder / "preset", preset=preset or "14b", precision=precision or "int8")
        if not show_plan(path, asked, dry=dry, as_json=as_json):
            sys.exit(1)


@main.command(context_settings=SETTINGS)
@demo_options
def demo(out_dir: Path, device: str, overwrite: bool, random: bool, **own: Any) -> None:
    """Run the whole job on a tiny model that draws talking faces: convert to int8 and bf16, infer both, compare.

    Portrait and voice are drawn and synthesized, unless you bring your own.
    """
    from lowvram.commands.shared_options import seconds_of
    from lowvram.compare.comparison import compare as compare_runs
    from lowvram.compare.page import write_page
    from lowvram.compare.tables import print_comparison
    from lowvram.demo import PAGE, Own, run_demo

    for name in ("audio_start", "audio_duration"):
        own[name] = None if own[name] is None else seconds_of(own[name], f"--{name.replace('_', '-')}")
    found = run_demo(out_dir, own=Own(**own), device=device, overwrite=overwrite, random=random)
    result = compare_runs(out_dir / "int8.json", out_dir / "bf16.json")
    result = dataclasses.replace(result, forced=found.forced, vae=found.vae)
    write_page(result, out_dir / PAGE)
    print_comparison(result, Console())
    if found.sheet is None:
        click.echo("The weights are random, so the pictures are noise: the demo shows the path, not the quality.")
    else:
        correlations = ", ".join(f"{name} {value:.2f}" for name, value in found.follows.items())
        click.echo(f"The mouth's opening correlates with the voice's loudness: {correlations}.")
        if own["image"]:
            click.echo(
                "It is looked for where drawn faces have their mouth, and not seen where a portrait has it elsewhere."
            )
        click.echo(found.sheet)
    click.echo(out_dir / PAGE)
    click.echo(out_dir / "int8.mp4")


@main.command(context_settings=SETTINGS)
@click.option("--gpus", type=int, help="Ranks to check for, one a GPU; default: all GPUs that are here.")
@click.option("--port", type=int, default=29500, help="Where several ranks meet.")
@click.option("--model", type=FILE, help="Artifact to judge memory by; default: the published 14B in int8.")
@click.option("--no-measure", is_flag=True, help="Do not copy to and from the GPUs to measure PCIe.")
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
def doctor(gpus: int | None, port: int, model: Path | None, no_measure: bool, as_json: bool) -> None:
    """Check this machine: what is here, what a run expects, what to set and why.

    Exits with 1 where a run would fail; a machine without a GPU is only warned about.
    """
    from lowvram.doctor.examine import Options, examine
    from lowvram.doctor.findings import to_json
    from lowvram.doctor.machine import this_machine

    options = Options(
        sizes=lambda: sizes_of(model), converted=model is not None, gpus=gpus, port=port, measure=not no_measure
    )
    findings = examine(this_machine(), options)
    if as_json:
        click.echo(json.dumps(to_json(findings), indent=1))
    else:
        colours = {"ok": "green", "warning": "yellow", "problem": "red"}
        for finding in findings:
            click.echo(f"{click.style(f'{finding.status:8}', fg=colours[finding.status])} {finding.text()}")
    if any(finding.status == "problem" for finding in findings):
        sys.exit(1)


@main.command(context_settings=SETTINGS)
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--report", type=FILE, help="Write a text to paste into a bug report.")
@click.option("--overwrite", is_flag=True, help="Replace a report of that name.")
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
def selftest(device: str, report: Path | None, overwrite: bool, as_json: bool) -> None:
    """Run every kernel against its reference, stream a tiny model, copy, time: minutes; what is found is kept.

    Exits with 1 where something fails that no other kernel makes good.
    """
    from lowvram.outputs import check_file
    from lowvram.selftest.examine import selftest as run
    from lowvram.selftest.report import bug_report, print_examined, write_text

    if report:
        check_file("--report", report, overwrite=overwrite)
    examined, note = run(device)
    if as_json:
        click.echo(json.dumps({"note": note, "devices": [each.to_json() for each in examined]}, indent=1))
    else:
        for each in examined:
            print_examined(each, Console())
        if note:
            click.echo(note)
    if report:
        write_text(report, bug_report(examined, note))
    if any(each.verdict.stuck for each in examined):
        sys.exit(1)


def sizes_of(model: Path | None) -> Any:
    """Sizes of an artifact's parts, or those of the published shapes in int8."""
    from lowvram.planning.model_sizes import model_sizes
    from lowvram_quantize.format import Artifact
    from lowvram_quantize.shape_artifact import write_shape_artifact

    with scratch("doctor") as folder:
        return model_sizes(Artifact.open(model or write_shape_artifact(folder / "preset")))


@contextlib.contextmanager
def scratch(what: str, place: Path | None = None) -> Iterator[Path]:
    """A folder for as long as a command needs it; in ``place``, or among temporary files.

    Raises:
        OutputError: there is none, or nothing can be written in it.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"lowvram-{what}-", dir=place))
        except OSError as error:
            said = f"no temporary file can be made ({error.strerror or error})"
            raise OutputError(f"{said}; set TMPDIR to a folder with room") from error
        yield Path(folder)


if __name__ == "__main__":
    main()
