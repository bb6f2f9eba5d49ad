"""Guard in front of everything that is served: who may ask, from where, and how much may come.

It stands before the page's routes too, which are Gradio's. Against a page of another site that a browser here has open:
the Host header has to be a name of this server's own (DNS rebinding), an Origin has to be the page's own, and the
browser is told to ask nobody else for anything. Against everybody else on the network: a token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import http.cookies
import ipaddress
import json
import re
import urllib.parse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lowvram.serve.limits import BODY_BYTES, FIELD_BYTES, MIB, Limits
from lowvram.serve.store import FILES

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_READS = ("GET", "HEAD")
_HERE = ("127.0.0.1", "localhost", "::1")
# Gradio's page has scripts and styles within itself, and makes functions of what its events say.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    b"content-security-policy": _POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"x-dns-prefetch-control": b"off",
}
# Of Gradio's routes those that the page asks for; one of the others leads anywhere, one hands requests on.
_PAGE = re.compile(
    r"/gradio_api/(heartbeat/\w+|queue/(data|join)|upload|upload_progress|file=(?!\w+:).+|startup-events|cancel|reset"
    r"|theme\.css|app_id)/?"
)
_JOBS, _GRADIO, _UPLOAD = "/api/jobs", "/gradio_api", "/gradio_api/upload"
_AT_ONCE = 8
_DRAINED = 8 * MIB
"""As much is still read of what is refused: a client that is sending hears of it only then."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Access:
    """Who may ask: ``token`` None asks for none; ``hosts`` are the names the server is asked by, None any."""

    token: str | None = None
    hosts: frozenset[str] | None = frozenset(_HERE)
    cookie: str = "lowvram"

    @classmethod
    def at(cls, host: str, port: int, token: str | None) -> Access:
        """Of a server that listens at ``host``: at all addresses it may be called by any name, as it has a token."""
        every = host in ("0.0.0.0", "::", "")
        return cls(token=token, hosts=None if every else frozenset({*_HERE, host.lower()}), cookie=f"lowvram_{port}")

    @property
    def cookie_value(self) -> str:
        """Not the token itself, which is all that a program needs elsewhere too."""
        return hmac.new((self.token or "").encode(), b"lowvram serve, cookie", hashlib.sha256).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class _Refusal(Exception):
    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Guard:
    """ASGI middleware. ``room`` says whether files of the page's uploads may take more."""

    def __init__(self, app: ASGIApp, access: Access, limits: Limits, room: Callable[[], bool] = lambda: True):
        self._app, self.access, self._limits, self._room = app, access, limits, room
        self._uploading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks over websockets
            await send({"type": "websocket.close", "code": 1008})
            return
        body = _Body(receive, self._most(scope), send)
        headers = _headers(scope)
        try:
            self._check_sender(scope, headers)
            if (answer := self._token(scope, headers)) is not None:
                await _answer(body.send, *answer)
                return
            self._check_route(scope)
            self._check_size(scope, headers)
        except _Refusal as refusal:
            await body.refuse(refusal)
            return
        try:
            with self._counted(scope):
                await self._app(scope, body.receive, body.send)
        except Exception as error:  # the app may have put the refusal into an error of its own
            refused = body.refusal or (error if isinstance(error, _Refusal) else None)
            if refused is None or body.begun:
                raise
            await body.refuse(refused)

    @contextlib.contextmanager
    def _counted(self, scope: Scope) -> Iterator[None]:
        """Only so many of the page's uploads at once; those of jobs have places in the queue."""
        if not scope["path"].startswith(_UPLOAD) or scope["method"] != "POST":
            yield
            return
        if self._uploading >= _AT_ONCE:
            raise _Refusal(429, f"{self._uploading} files are being uploaded; try again when one of them is there")
        self._uploading += 1
        try:
            yield
        finally:
            self._uploading -= 1

    def _most(self, scope: Scope) -> int:
        files = 0
        if scope["method"] == "POST":
            files = len(FILES) if scope["path"] == _JOBS else 1 if scope["path"].startswith(_UPLOAD) else 0
        return files * (self._limits.upload_bytes + FIELD_BYTES) + BODY_BYTES

    def _check_sender(self, scope: Scope, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self.access.hosts is not None and _name_of(host) not in self.access.hosts:
            raise _Refusal(
                421, f"the Host is {host[:80]!r}; expected one of {', '.join(sorted(self.access.hosts))}: ask by that"
            )
        origin = headers.get("origin")
        if origin is not None and urllib.parse.urlsplit(origin).netloc.lower() != host.lower():
            raise _Refusal(403, f"the request comes from {origin[:80]!r}, another site; expected this one alone")
        cross = headers.get("sec-fetch-site") in ("cross-site", "same-site") and origin is None
        if cross and not (scope["method"] in _READS and headers.get("sec-fetch-mode") == "navigate"):
            raise _Refusal(403, "the request comes from a page of another site; expected this one alone")

    def _check_route(self, scope: Scope) -> None:
        if scope["path"].startswith(_GRADIO) and _PAGE.fullmatch(scope["path"]) is None:
            raise _Refusal(404, f"{scope['path'][:80]} is no route of the page; /api/docs lists those of the API")

    def _token(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, dict[str, str]] | None:
        """None where the token is right, or none is asked for; else an answer, which sets the cookie once."""
        token = self.access.token
        if token is None:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _equal(given.strip(), token):
            return None
        jar: http.cookies.SimpleCookie = http.cookies.SimpleCookie()
        with_cookie = headers.get("cookie", "")
        try:
            jar.load(with_cookie)
        except http.cookies.CookieError:
            jar = http.cookies.SimpleCookie()
        if (found := jar.get(self.access.cookie)) is not None and _equal(found.value, self.access.cookie_value):
            return None
        query = urllib.parse.parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if scope["method"] in _READS and any(name == "token" and _equal(value, token) for name, value in query):
            rest = urllib.parse.urlencode([pair for pair in query if pair[0] != "token"])
            place = "/" + scope["path"].lstrip("/")
            cookie = f"{self.access.cookie}={self.access.cookie_value}; HttpOnly; SameSite=Strict; Path=/"
            location = urllib.parse.quote(place, safe="/=:@") + (f"?{rest}" if rest else "")
            return 303, "", {"location": location, "set-cookie": cookie}
        raise _Refusal(401, "the token is missing or wrong; expected ?token=... once, or Authorization: Bearer ...")

    def _check_size(self, scope: Scope, headers: dict[str, str]) -> None:
        length, most = headers.get("content-length", "0"), self._most(scope)
        if not (length.isascii() and length.isdigit()):
            raise _Refusal(400, f"the Content-Length is {length[:40]!r}; expected a number of bytes")
        if int(length) > most:
            raise _too_large(int(length), most)
        if scope["path"].startswith(_UPLOAD) and not self._room():
            raise _Refusal(507, "files of the page that nobody took fill their share; try again in an hour")


class _Body:
    """What comes in, counted, and what goes out, with headers of ours; a refusal takes the place of any answer."""

    def __init__(self, receive: Receive, most: int, send: Send):
        self._receive, self._most, self._send = receive, most, send
        self._bytes, self._ended = 0, False
        self.begun = False
        self.refusal: _Refusal | None = None

    async def receive(self) -> Message:
        if self.refusal is not None:
            raise self.refusal
        message = await self._receive()
        self._ended = self._ended or not message.get("more_body", False)
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._most:
            self.refusal = _too_large(self._bytes, self._most)
            raise self.refusal
        return message

    async def send(self, message: Message) -> None:
        if self.refusal is not None and not self.begun:
            raise self.refusal  # an app that takes our error for one of its own would answer something else
        if message["type"] == "http.response.start":
            self.begun = True
            there = {name.lower() for name, _ in message.get("headers", [])}
            more = [(name, value) for name, value in _HEADERS.items() if name not in there]
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await self._send(message)

    async def refuse(self, refusal: _Refusal) -> None:
        """Raises: what it was, where an answer has begun already."""
        if self.begun:
            raise refusal
        drained = 0
        while not self._ended and drained < _DRAINED:
            message = await self._receive()
            drained += len(message.get("body", b""))
            self._ended = message["type"] != "http.request" or not message.get("more_body", False)
        self.refusal = None
        await _answer(self.send, refusal.status, refusal.reason, {} if self._ended else {"connection": "close"})


async def _answer(send: Callable[[Any], Any], status: int, reason: str, headers: dict[str, str]) -> None:
    body = json.dumps({"error": reason}).encode() if reason else b""
    named = {"content-type": "application/json", "content-length": str(len(body)), "cache-control": "no-store"}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in {**named, **headers}.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _headers(scope: Scope) -> dict[str, str]:
    """By lower-case name; of one that came twice the first, but two Hosts are none."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        found[key] = "" if key == "host" and key in found else found.get(key, text)
    return found


def _name_of(host: str) -> str:
    """Of "name:port" or "[::1]:port" the name."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _equal(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())


def _too_large(there: int, most: int) -> _Refusal:
    return _Refusal(413, f"the request has {there} bytes or more; expected at most {most}: send less")
