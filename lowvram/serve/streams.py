"""Streams that follow a job: its state as server-sent events, and its video while the file grows."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, BinaryIO

from lowvram.serve.errors import Refused
from lowvram.serve.jobs import OPEN_STATES, Job
from lowvram.serve.queue import WorkQueue

LOOK_S = 0.2
_CHUNK = 2**18
_STILL_THERE_S = 15.0


async def events(
    queue: WorkQueue, name: str, described: Callable[[Job], dict[str, Any]], *, still_there_s: float = _STILL_THERE_S
) -> AsyncIterator[bytes]:
    """An event ``state`` now, at every change, and at last of how it ended; a comment where nothing happens, so that
    nobody between takes the connection for a dead one."""
    said, at = None, time.monotonic()
    while True:
        try:
            job = queue.store.job(name)
        except Refused:  # it was removed
            return
        facts = described(job)
        if facts != said:
            said, at = facts, time.monotonic()
            yield f"event: state\ndata: {json.dumps(facts)}\n\n".encode()
        elif time.monotonic() - at > still_there_s:
            at = time.monotonic()
            yield b": waiting\n\n"
        if job.state not in OPEN_STATES or queue.stopping:
            return
        await asyncio.sleep(LOOK_S)


async def growing_video(queue: WorkQueue, name: str) -> AsyncIterator[bytes]:
    """The bytes of the fragmented MP4 from its begin on, as they are written, until the job has ended.

    The file that is open stays readable when it gets another name or goes, as it does at the end. Where the video is
    begun again, with less to compute, the stream ends: what was sent is another video.
    """
    place, sent = queue.store.place(name), 0
    while (file := _opened(place.outputs.partial)) is None:
        if queue.store.job(name).state not in OPEN_STATES or queue.stopping:
            # One that was begun and ended between two looks has the name of a finished one by now.
            file = _opened(place.watchable)
            if file is None:
                return
            break
        await asyncio.sleep(LOOK_S)
    with file:
        while True:
            # First: what is read to its end behind that is all there will be.
            over = queue.store.job(name).state not in OPEN_STATES or queue.stopping
            while chunk := file.read(_CHUNK):
                sent += len(chunk)
                yield chunk
            if over or file.seek(0, 2) < sent:
                return
            file.seek(sent)
            await asyncio.sleep(LOOK_S)


def _opened(path: Path | None) -> BinaryIO | None:
    """To be read; None where there is no such file, be it that it has just got another name."""
    try:
        return path.open("rb") if path is not None else None
    except FileNotFoundError:
        return None
