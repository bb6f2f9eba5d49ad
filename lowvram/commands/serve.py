"""Command ``serve``: a process that stays, with a queue, an HTTP API and a page."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowvram.byte_sizes import parse_bytes
from lowvram.commands.shared_options import FILE, declared, machine_options, open_pipeline
from lowvram_kernels.errors import ConfigError

if TYPE_CHECKING:
    from lowvram.serve.presets import Presets

_EXTRA = ("fastapi", "gradio", "multipart", "pydantic", "python_multipart", "starlette", "uvicorn")


def serve_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where it listens, where its files are, what a client may ask, and on what videos are made."""
    options: list[Callable[..., Any]] = [
        click.option("--model", type=FILE, required=True, help="Artifact that convert wrote."),
        click.option(
            "--host", default="127.0.0.1", help="Address to listen at; any but this machine's own has a token."
        ),
        click.option("--port", type=int, default=7860, help="Port to listen at; 0: any that is free."),
        click.option(
            "--token",
            envvar="LOWVRAM_TOKEN",
            help="What a client has to know, or $LOWVRAM_TOKEN; default: none here, one that is made elsewhere.",
        ),
        click.option(
            "--dir", "folder", type=FILE, default=Path("lowvram-serve"), help="Folder of jobs and their files."
        ),
        click.option("--max-queue", type=int, default=20, help="Jobs that wait, at most."),
        click.option("--max-upload", default="200MiB", help="Of a portrait, and of a voice, at most."),
        click.option("--max-seconds", type=float, default=600.0, help="Of a video, at most."),
        click.option("--no-page", is_flag=True, help="The HTTP API alone."),
    ]
    return declared(options, machine_options(command))


def serve_as_asked(options: dict[str, Any]) -> None:
    """Serve until the process is told to end.

    Raises:
        ConfigError: the extra is not installed, or an option that cannot be used.
        LowvramError: as of ``lowvram.serve.server.serve``.
    """
    try:
        from lowvram.serve.limits import Limits
        from lowvram.serve.making import PipelineMaker
        from lowvram.serve.presets import presets_of
        from lowvram.serve.server import Address, serve

        page = None if options["no_page"] else _page()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _EXTRA:
            raise
        raise ConfigError(
            f"{error.name} is not here, which serve needs; install it: pip install 'lowvram[ui]'"
        ) from error
    limits = Limits(
        queue=options["max_queue"],
        upload_bytes=parse_bytes(options["max_upload"], "--max-upload"),
        seconds=options["max_seconds"],
    )
    address = Address(host=options["host"], port=options["port"], token=options["token"])
    logging.getLogger("lowvram.serve").setLevel(logging.INFO)  # what becomes of each job is said
    pipeline = open_pipeline(options, resident=True)
    found: Presets = presets_of(pipeline)
    serve(
        options["folder"],
        PipelineMaker(pipeline),
        lambda: found,
        address=address,
        limits=limits,
        say=click.echo,
        page=page,
    )


def _page() -> Any:
    from lowvram.serve.page import mounted

    if find_spec("gradio") is None:  # imported later, when the folder of its files is known
        raise ModuleNotFoundError("no module gradio", name="gradio")
    return mounted
