"""A maker without a model, and an API above it: jobs end when a test says so."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from starlette.testclient import TestClient

from lowvram.media.samples import draw_portrait, synth_voice, write_wav
from lowvram.media.video import VideoWriter
from lowvram.serve.api import make_app
from lowvram.serve.guard import Access, Guard
from lowvram.serve.jobs import Job, Progress
from lowvram.serve.limits import Limits
from lowvram.serve.presets import NOT_PREDICTED, Preset, Presets
from lowvram.serve.queue import WorkQueue
from lowvram.serve.store import Place, Store

PRESETS = Presets(presets=(Preset(name="light", size="384*256"),), device="cpu", note=NOT_PREDICTED)
PARTS = 3


class FakeMaker:
    """Writes ``PARTS`` bytes, one for each time that a test lets it go on; ``fail`` is raised behind the first."""

    def __init__(self, fail: Exception | None = None, *, free: bool = False):
        self.made: list[str] = []
        self.fail = fail
        self._go, self._free = threading.Semaphore(0), free

    def go_on(self, parts: int = 1) -> None:
        for _ in range(parts):
            self._go.release()

    def run_free(self) -> None:
        self._free = True
        self._go.release()

    def make(self, job: Job, place: Place, watch: Callable[[Progress], None]) -> None:
        self.made.append(job.id)
        outputs = place.outputs
        with outputs.partial.open("wb") as file:
            for part in range(1, PARTS + 1):
                if not self._free:
                    self._go.acquire()
                file.write(bytes([part]))
                file.flush()
                watch(Progress(frames=part, total_frames=PARTS, seconds=float(part)))
                if self.fail is not None:
                    raise self.fail
        outputs.partial.rename(outputs.video)
        assert outputs.report
        outputs.report.write_text("{}")


def until(true: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait for it. Raises: AssertionError where it does not come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


@contextlib.contextmanager
def running(folder: Path, maker: FakeMaker, limits: Limits | None = None) -> Iterator[WorkQueue]:
    with Store(folder) as store, WorkQueue(store, maker, limits or Limits()) as queue:
        try:
            yield queue
        finally:
            queue.stop()
            maker.run_free()


@contextlib.contextmanager
def client_of(queue: WorkQueue, access: Access | None = None) -> Iterator[TestClient]:
    app, api = make_app(queue, lambda: PRESETS)
    guard = Guard(app, access or Access(), queue.limits)
    with TestClient(guard, base_url="http://127.0.0.1:7860", raise_server_exceptions=False) as client:
        client.api = api
        yield client


def add(queue: WorkQueue, prompt: str = "A person") -> Job:
    """A job whose files nobody reads."""
    with queue.store.incoming() as place:
        for path in (place.image, place.audio, place.thumbnail):
            path.write_bytes(b"x")
        return queue.add(place, {"prompt": prompt})


def picture() -> bytes:
    buffer = io.BytesIO()
    draw_portrait(128, 128).save(buffer, format="PNG")
    return buffer.getvalue()


def voice(folder: Path, seconds: float = 1.0) -> bytes:
    path = folder / f"voice-{seconds}.wav"
    write_wav(path, synth_voice(seconds), 16000)
    return path.read_bytes()


def mask(box: tuple[int, int, int, int]) -> bytes:
    drawn, buffer = Image.new("L", (128, 128)), io.BytesIO()
    drawn.paste(255, box)
    drawn.save(buffer, format="PNG")
    return buffer.getvalue()


def second_person(folder: Path) -> dict[str, bytes]:
    """What the form takes for one, and poses."""
    masks = mask((0, 0, 64, 128)), mask((64, 0, 128, 128))
    poses = folder / "poses.mp4"
    with VideoWriter(poses, 64, 64) as writer:
        writer.write(np.full((8, 64, 64, 3), 90, np.uint8))
    files = {"image2": PICTURE, "audio2": voice(folder, 1.2), "mask": masks[0], "mask2": masks[1]}
    return files | {"pose_video": poses.read_bytes()}


PICTURE = picture()
FORM = {"prompt": "A person speaks", "size": "128*128"}


def send(client: TestClient, sound: bytes, image: bytes = PICTURE, **fields: Any):
    files = {"image": ("../../evil.png", image, "image/png"), "audio": ("/etc/passwd", sound, "audio/wav")}
    return client.post("/api/jobs", files=files, data={**FORM, **fields})


def settled(queue: WorkQueue, name: str, state: str) -> None:
    until(lambda: queue.store.job(name).state == state)


def untouched(queue: WorkQueue) -> bool:
    """Whether nothing of what was refused is left."""
    folder = queue.store.folder
    return not queue.store.jobs() and not [
        path for path in folder.rglob("*") if path.is_file() and ".lock" not in path.name
    ]
