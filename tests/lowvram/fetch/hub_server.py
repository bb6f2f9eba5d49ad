"""A hub of a few small files on 127.0.0.1, which can be made to fail."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from typing import Any

COMMIT = "c" * 40


class HubServer:
    """``repos``: files of each repository. ``broken``: bytes that a file comes with instead. ``cut``: of a file so many
    bytes come and then the connection ends, so many times. ``refused``: repositories that are only for those who are
    let in. ``asked``: path and Range of every request for a file."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.broken: dict[str, bytes] = {}
        self.cut: dict[str, list[int]] = {}
        self.refused: set[str] = set()
        self.failing = False
        self.asked: list[tuple[str, str | None]] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        if self.failing:
            self._send(request, 500, b"", {})
        elif path.startswith("/api/models/"):
            self._listing(request, path.removeprefix("/api/models/").partition("/revision/"))
        else:
            repo, _, rest = path[1:].partition("/resolve/")
            self._file(request, repo, rest.partition("/")[2])

    def _listing(self, request: http.server.BaseHTTPRequestHandler, asked: tuple[str, str, str]) -> None:
        repo, _, revision = asked
        if repo not in self.repos:
            self._send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        if revision not in ("", "main", COMMIT):
            self._send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        files = [self._sibling(name, data) for name, data in self.repos[repo].items()]
        facts = {"id": repo, "sha": COMMIT, "siblings": files, "cardData": self.cards.get(repo, {})}
        facts["gated"] = "manual" if repo in self.refused else False
        self._send(request, 200, json.dumps(facts).encode(), {"Content-Type": "application/json"})

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        found: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git}
        if not name.endswith((".json", ".md", "LICENSE.txt")):
            found["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
        return found

    def _file(self, request: http.server.BaseHTTPRequestHandler, repo: str, name: str) -> None:
        span = request.headers.get("Range")
        self.asked.append((name, span))
        if repo in self.refused:
            self._send(request, 403, b"{}", {"X-Error-Code": "GatedRepo"})
            return
        data = self.broken.get(name, self.repos[repo][name])
        begin = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
        headers = {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if span else {}
        cuts = self.cut.get(name)
        self._send(request, 206 if span else 200, data[begin:], headers, cuts.pop(0) if cuts else None)

    def _send(
        self,
        request: http.server.BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str],
        cut: int | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            request.wfile.flush()
            request.close_connection = True
