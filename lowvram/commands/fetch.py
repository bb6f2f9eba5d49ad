"""Command ``fetch``: say what would come, of which licence and size; and when that is agreed to, get it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from lowvram.byte_sizes import gib
from lowvram.fetch.catalogue import CATALOGUE
from lowvram.fetch.download import Folder, check_room
from lowvram.fetch.hub import Hub, Published
from lowvram.outputs import check_folder
from lowvram_kernels.errors import ConfigError
from lowvram_quantize.claims import writing


def fetch_as_asked(what: str, out: Path, *, revisions: Sequence[str], yes: bool, quiet: bool) -> list[Path]:
    """Get the files of ``what`` into folders in ``out``. Returns the folders.

    Args:
        revisions: REPO@COMMIT of repositories that are not to be as they are now.
        yes: it was agreed to beforehand.

    Raises:
        LowvramError: nobody agrees, no hub, no room, files that cannot be used.
    """
    check_folder("--out", out, make=True)
    wanted = _revisions(what, revisions)
    hub = Hub()
    with hub.online():
        listings = [hub.listing(source, wanted.get(source.repo)) for source in CATALOGUE[what]]
        folders = [Folder(out, listing) for listing in listings]
        missing = [(folder, file) for folder in folders for file in folder.missing()]
        if missing:
            _tell(folders, hub)
            check_room(folders, out)
            _agree(sum(folder.to_come(file) for folder, file in missing), yes)
            _get(hub, missing, out, quiet)
    return [folder.path for folder in folders]


def _revisions(what: str, given: Sequence[str]) -> dict[str, str]:
    repos = [source.repo for source in CATALOGUE[what]]
    wanted = dict(each.rpartition("@")[::2] for each in given)
    if unknown := wanted.keys() - set(repos):
        raise ConfigError(
            f"--revision is of {', '.join(sorted(unknown))!r}; expected {' or '.join(repos)}, then @COMMIT"
        )
    return wanted


def _get(hub: Hub, missing: list[tuple[Folder, Published]], out: Path, quiet: bool) -> None:
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        disable_progress_bars,
        enable_progress_bars,
    )

    out.mkdir(parents=True, exist_ok=True)
    with writing(out / "fetch", "lowvram fetch"):
        try:
            if quiet:
                disable_progress_bars()
            for folder, file in missing:
                folder.fetch(hub, file)
        finally:
            if quiet:
                enable_progress_bars()


def _tell(folders: list[Folder], hub: Hub) -> None:
    for folder in folders:
        listing = folder.listing
        missing = folder.missing()
        gate = "; it wants to be asked for on its page first" if listing.gated else ""
        click.echo(
            f"{hub.address}/{listing.source.repo} at {listing.commit[:12]}, licence: {listing.licence}{gate}\n"
            f"  {len(listing.files)} files, {gib(listing.size)}, to {folder.path}; to come: {len(missing)} files, "
            f"{gib(sum(folder.to_come(file) for file in missing))}",
            err=True,
        )


def _agree(size: int, yes: bool) -> None:
    if yes:
        return
    if not terminal():
        raise ConfigError(f"{gib(size)} would be fetched; expected that to be agreed to: run again with --yes")
    if not click.confirm(f"Fetch {gib(size)}?", err=True):
        raise ConfigError("nothing was fetched, as that was not agreed to")


def terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty()


def next_step(folders: list[Path]) -> str:
    """The command that makes an artifact of it."""
    base, lora = folders
    words = ["lowvram", "convert", "--ckpt-dir", str(base), "--lora", str(lora / "liveavatar.safetensors")]
    return shlex.join([*words, "--out", "live-avatar-int8"])
