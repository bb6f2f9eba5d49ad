"""A headless Chromium that is driven over a pipe, with nothing beside the standard library."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Page:
    """One tab. ``requests`` are the addresses of all that it asked for, ``errors`` what its scripts complained of."""

    def __init__(self, send: int, receive: int):
        self._send, self._receive, self._buffer, self._last = send, receive, b"", 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.errors: list[str] = []

    def attach(self, width: int, height: int) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Page", "Runtime", "DOM", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def call(self, method: str, **parameters: Any) -> Any:
        """Raises: RuntimeError: Chromium refuses it, or is gone."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for answer in self._arrived(1.0):
                if answer.get("id") == self._last:
                    if "error" in answer:
                        raise RuntimeError(f"{method}: {answer['error']}")
                    return answer["result"]
        raise RuntimeError(f"{method} was not answered in 60 s")

    def _arrived(self, seconds: float) -> list[dict[str, Any]]:
        if not select.select([self._receive], [], [], seconds)[0]:
            return []
        data = os.read(self._receive, 2**20)
        if not data:
            raise RuntimeError("chromium has ended")
        *whole, self._buffer = (self._buffer + data).split(b"\0")
        found = [json.loads(each) for each in whole]
        for each in found:
            self._note(each.get("method"), each.get("params", {}))
        return found

    def _note(self, method: str | None, facts: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(facts["exceptionDetails"]["text"])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def value(self, script: str) -> Any:
        """What a script's expression gives; True of an element."""
        plain = f"(found => found instanceof Node ? true : found)({script})"
        answer = self.call("Runtime.evaluate", expression=plain, returnByValue=True, userGesture=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script[:80]}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 60.0) -> Any:
        """Wait until the expression is true; returns it. Raises: AssertionError."""
        end = time.monotonic() + seconds
        while not (found := self.value(script)):
            assert time.monotonic() < end, f"did not come within {seconds} s: {script}"
            self._arrived(0.1)
        return found

    def upload(self, selector: str, file: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file.resolve())])

    def click(self, selector: str) -> None:
        """With a mouse where it is, as a person would: what lies above it would be hit instead."""
        self.value(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        box = self.value(f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
                         "return [b.x + b.width / 2, b.y + b.height / 2] })()")  # fmt: skip
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def write(self, selector: str, text: str) -> None:
        """In place of what stands in a field."""
        self.click(selector)
        self.value(f"document.querySelector({selector!r}).select()")
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def asked_elsewhere(self, host: str) -> list[str]:
        """Addresses of requests that left ``host``."""
        own = ("data", "blob", "about", "chrome")
        parsed = [(url, urllib.parse.urlsplit(url)) for url in self.requests]
        return [url for url, parts in parsed if parts.scheme not in own and parts.hostname != host]


@contextlib.contextmanager
def chromium(width: int = 1280, height: int = 900) -> Iterator[Page]:
    """Raises: SystemExit: there is none here."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        raise SystemExit(f"none of {', '.join(NAMES)} is here; install one")
    there, send = os.pipe()
    receive, back = os.pipe()
    ours = [os.dup(fd) for fd in (there, back)]  # none of these is 3 or 4, which the new process gets

    def given() -> None:
        os.dup2(ours[0], 3)
        os.dup2(ours[1], 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        options += ["--no-first-run", "--disable-background-networking", "--mute-audio", f"--user-data-dir={profile}"]
        options += [f"--window-size={width},{height}", "--autoplay-policy=document-user-activation-required"]
        process = subprocess.Popen(
            [program, *options], preexec_fn=given, close_fds=False, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        try:
            page = Page(send, receive)
            page.attach(width, height)
            yield page
        finally:
            process.terminate()
            process.wait(20)
