"""A hub, asked through huggingface_hub: what a repository holds, and the bytes of a file, from where they broke off."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

from lowvram.fetch.catalogue import Source
from lowvram_kernels.errors import FetchError, InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A file as the hub says it is: ``checksum`` is of its bytes, SHA-256, or git's of a small one where ``git``."""

    name: str
    size: int
    checksum: str
    git: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """Files of a repository at one commit, its licence in the hub's words, and whether it wants to be asked for."""

    source: Source
    commit: str
    licence: str
    gated: bool
    files: tuple[Published, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


class Hub:
    """Within ``online`` the network is used, and at no other time: elsewhere in this process it stays switched off."""

    def __init__(self) -> None:
        from huggingface_hub import constants

        self.address = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")

    @contextlib.contextmanager
    def online(self) -> Iterator[None]:
        """Lift ``HF_HUB_OFFLINE`` for this call alone; of this process nothing else is told meanwhile."""
        from huggingface_hub import constants

        before = constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY
        try:
            constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY = False, True
            yield
        finally:
            constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY = before

    def listing(self, source: Source, revision: str | None) -> Listing:
        """What is to be fetched of a repository.

        Raises:
            FetchError: the hub cannot be reached, or says something that cannot be used.
            InputError: there is no such repository or revision, or it is only for those who are let in.
        """
        from huggingface_hub import HfApi

        with self._failing(source.repo):
            info = HfApi(endpoint=self.address).model_info(source.repo, revision=revision, files_metadata=True)
        found = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        if missing := source.missing(found):
            raise FetchError(
                f"{source.repo} at {self.address} has no {', '.join(missing)}; expected what its README names, give an "
                "earlier --revision"
            )
        files = []
        for name in source.chosen(found):
            sibling, path = found[name], PurePosixPath(name)
            checksum = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
            if path.is_absolute() or ".." in path.parts or "\\" in name or sibling.size is None or not checksum:
                raise FetchError(
                    f"{source.repo} at {self.address} lists {name!r} without size, checksum or a safe name"
                )
            files.append(Published(name=name, size=sibling.size, checksum=checksum, git=not sibling.lfs))
        licence = str(getattr(info.card_data, "license", None) or "")
        return Listing(
            source=source,
            commit=str(info.sha),
            licence=licence or "none stated",
            gated=bool(info.gated),
            files=tuple(files),
        )

    def read(self, listing: Listing, file: Published, into: BinaryIO, done: int) -> None:
        """Append a file's bytes from ``done`` on; what has come stays where this fails.

        Raises:
            FetchError, InputError: as of ``listing``.
            OSError: ``into`` cannot be written.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        repo = listing.source.repo
        url = hf_hub_url(repo, file.name, revision=listing.commit, endpoint=self.address)
        with self._failing(f"{repo}'s {file.name}"):
            http_get(
                url,
                into,
                resume_size=done,
                headers=build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.name,
            )

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Errors of the library, of whichever edition, as ours."""
        from huggingface_hub import errors

        try:
            yield
        except errors.GatedRepoError as error:
            raise InputError(
                f"{what} is only for those who are let in: ask at {self.address}, then log in with hf auth login, or "
                "set HF_TOKEN, and run again"
            ) from error
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
            raise InputError(
                f"{what} is not to be had at {self.address} ({_first_line(error)}); expected a repository and revision "
                "that are there"
            ) from error
        except errors.HfHubHTTPError as error:
            raise FetchError(f"{what}: {self.address} answers {_first_line(error)}; try again later") from error
        except OSError as error:
            if type(error) is OSError and error.errno is None:  # the library's own, of a size that does not agree
                raise FetchError(f"{what} did not come whole ({_first_line(error)}); run again") from error
            if isinstance(error, ConnectionError | TimeoutError):
                raise self._unreachable(what, error) from error
            raise
        except Exception as error:
            if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
                raise
            raise self._unreachable(what, error) from error

    def _unreachable(self, what: str, error: Exception) -> FetchError:
        return FetchError(
            f"{what} could not be fetched: {self.address} cannot be reached, or breaks off ({_first_line(error)}); "
            "check the network, then run again, it goes on where it was"
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
