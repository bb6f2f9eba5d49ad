"""Options of ``batch``; libraries are imported where they are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from lowvram.commands.shared_options import FILE, declared, request_options


def batch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The list, where its videos go, and what holds for all jobs that say nothing else."""
    first: list[Callable[..., Any]] = [
        click.argument("jobs", type=FILE, required=False, metavar="LIST"),
        click.option("--sample-list", type=FILE, help="The same, as the reference calls it."),
        click.option("--model", type=FILE, required=True, help="Artifact that convert wrote."),
        click.option(
            "--out-dir", "--save-dir", "out_dir", type=FILE, required=True,
            help="Folder for videos, their reports, results.json and results.csv.",
        ),
        click.option("--image", type=FILE, help="Portrait of jobs that name none; also a.png+b.png."),
        click.option("--audio", type=FILE, help="Voice of jobs that name none; also a.wav+b.wav."),
        click.option("--prompt", help="Prompt of jobs that have none; or @FILE."),
    ]  # fmt: skip
    last: list[Callable[..., Any]] = [
        click.option(
            "--segment-minutes",
            type=float,
            help="Keep a state every so many minutes of video, from which a job that was cut goes on.",
        ),
        click.option("--overwrite", is_flag=True, help="Make again what was made of other files or settings."),
        click.option("--ray", metavar="ADDRESS", help="Over a Ray cluster: HOST:PORT, auto or local; a worker a card."),
        click.option("--workers", type=int, help="With --ray: so many workers at the most."),
        click.option("-q", "--quiet", is_flag=True, help="No progress bars."),
        click.option("--json", "as_json", is_flag=True, help="The results as JSON."),
    ]
    return declared(first, request_options(declared(last, command)))
