"""Server: store, queue, API and page put together, and served until somebody ends it."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from lowvram.serve.api import Api, make_app
from lowvram.serve.guard import Access, Guard, is_loopback
from lowvram.serve.limits import Limits
from lowvram.serve.making import Maker
from lowvram.serve.presets import Presets
from lowvram.serve.queue import WorkQueue
from lowvram.serve.store import UPLOADS, Store
from lowvram_kernels.errors import ConfigError, HardwareError

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)
_GRACE_S = 2
_UPLOADS_KEPT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Address:
    """Where the server listens; ``token`` None: one is made where others can reach it. Validated at construction."""

    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; expected 1 to 65535, or 0 for any that is free")
        if self.token is not None and not (8 <= len(self.token) <= 200 and self.token.isprintable()):
            raise ConfigError("--token is too short, too long, or has signs that cannot be typed; expected 8 to 200")

    def settled(self) -> Address:
        """With a token, where one is needed."""
        if self.token is not None or is_loopback(self.host):
            return self
        return dataclasses.replace(self, token=secrets.token_urlsafe(24))

    def url(self, port: int) -> str:
        """What a browser is given; with the token, which it then keeps in a cookie."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        query = "" if self.token is None else f"?token={urllib.parse.quote(self.token)}"
        return f"http://{host}:{port}/{query}"


class _Server(uvicorn.Server):
    """Says where it listens when it does, and ends the queue's streams when it is told to end."""

    def __init__(self, config: uvicorn.Config, begun: Callable[[int], None], stop: Callable[[], None]):
        super().__init__(config)
        self._begun, self._stop = begun, stop

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._begun(self.servers[0].sockets[0].getsockname()[1])

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Not uvicorn's own, which raises the signal again behind its end: SIGTERM would end the process before the
        job under way has."""
        self._stop()
        # Pages that are open wait for events; that they are ended is nothing to be told of.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self.force_exit = self.should_exit
        self.should_exit = True


def serve(
    folder: Path,
    maker: Maker,
    presets: Callable[[], Presets],
    *,
    address: Address,
    limits: Limits,
    say: Callable[[str], None],
    page: Callable[[FastAPI, Api], FastAPI] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM. ``say`` is given the URL when it can be asked; ``page`` mounts a page.

    Raises:
        InputError, OutputError: ``folder`` cannot be used.
        HardwareError: the address cannot be listened at.
    """
    where = address.settled()
    with Store(folder) as store:
        queue = WorkQueue(store, maker, limits)
        app, api = make_app(queue, presets)
        if page is not None:
            app = page(app, api)
        with queue:
            _listen(guarded(app, queue, where), queue, where, say)


def guarded(app: Any, queue: WorkQueue, where: Address) -> Guard:
    """The application behind its guard."""
    limits, uploads = queue.limits, queue.store.folder / UPLOADS

    def room() -> bool:
        there = sum(path.stat().st_size for path in uploads.rglob("*") if path.is_file())
        return there < _UPLOADS_KEPT * limits.upload_bytes

    return Guard(app, Access.at(where.host, where.port, where.token), limits, room)


def _listen(app: Any, queue: WorkQueue, where: Address, say: Callable[[str], None]) -> None:
    config = uvicorn.Config(
        app,
        host=where.host,
        port=where.port,
        log_config=None,
        access_log=False,  # it would write the token down
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=_GRACE_S,
        h11_max_incomplete_event_size=64 * 1024,
    )
    server = _Server(config, lambda port: say(where.url(port)), queue.stop)
    try:
        server.run()
    except (OSError, SystemExit) as error:
        if server.started:
            raise
        raise HardwareError(
            f"nothing can listen at --host {where.host} --port {where.port}; choose another --port"
        ) from error
