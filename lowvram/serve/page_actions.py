"""Actions of the page: what its buttons do, above the queue and the checks of the API."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from lowvram.serve import page_parts as parts
from lowvram.serve.errors import Refused
from lowvram.serve.jobs import DONE, OPEN_STATES, RUNNING, Job, new_id
from lowvram.serve.limits import MIB
from lowvram.serve.settings import Settings, parse_settings
from lowvram.serve.store import FILES, UPLOADS, uploaded
from lowvram_kernels.errors import LowvramError

if TYPE_CHECKING:
    from lowvram.serve.api import Api

FIELDS = (
    "image", "audio", "prompt", "preset", "size", "base_seed", "infer_frames", "sample_steps", "num_clip",
    "audio_start", "audio_duration", "cond_rope_distance", "upscale", "online_decode",
    "image2", "audio2", "mask", "mask2", "pose_video",
)  # fmt: skip
"""Of the form, in its order."""
_NO_SETTINGS = (*FILES, "preset")
_ENDINGS = {name: ".wav" if name.startswith("audio") else ".png" for name in FILES} | {"pose_video": ".mp4"}
Seen = tuple[str, str]
"""What a browser was shown last: of the player, and of the history."""


class Actions:
    """Each gives new values for what it is bound to in ``page_layout``; a reason for a refusal is shown beside."""

    def __init__(self, api: Api):
        self._api = api

    def look(self, shown: str, seen: Seen) -> list[Any]:
        """What is live, as it is now; what has not changed is left as it is: a video that plays goes on."""
        queue, store = self._api.queue, self._api.store
        jobs = store.jobs()
        job = next((job for job in jobs if job.id == shown), None)
        under_way = job is not None and job.state in OPEN_STATES
        playing, listed = _playing(job), "".join(f"{job.id}{job.state}" for job in jobs)
        player = parts.player(job) if playing != seen[0] else gr.skip()
        fresh = listed != seen[1]
        finished = [parts.choice(job) for job in reversed(jobs) if job.state == DONE]
        every = [parts.choice(job) for job in reversed(jobs)]
        return [
            job.id if job else "",
            (playing, listed),
            player,
            parts.progress(job, queue.position(job) if job else None),
            parts.memory(self._api.rows(job.id) if job else []) if under_way or playing != seen[0] else gr.skip(),
            parts.history(jobs) if fresh or under_way else gr.skip(),
            gr.Button(interactive=under_way),
            gr.Dropdown(choices=every) if fresh else gr.skip(),
            *((gr.Dropdown(choices=finished),) * 2 if fresh else (gr.skip(), gr.skip())),
        ]

    def opened(self, shown: str, seen: Seen) -> list[Any]:
        """As of ``look``, with the job that runs, where there is one."""
        running = (job.id for job in self._api.store.jobs() if job.state == RUNNING)
        return self.look(shown or next(running, ""), seen)

    def make(self, shown: str, seen: Seen, *values: Any) -> list[Any]:
        """Queue what the form says, and show it."""
        given = dict(zip(FIELDS, values, strict=True))
        with _shown_reasons():
            return self.look(self._submit(given).id, seen)
        return self.look(shown, seen)

    def _submit(self, given: dict[str, Any]) -> Job:
        api = self._api
        for name, what in (("image", "a portrait"), ("audio", "a voice")):
            if not given[name]:
                raise Refused(422, f"{what} is missing; choose a file")
        with api.queue.reserved(), api.store.incoming() as place:
            for name in (name for name in FILES if given[name]):
                source, target = uploaded(given[name], api.store.folder / UPLOADS), place.file(name)
                if source.stat().st_size > api.limits.upload_bytes:
                    raise Refused(413, f"{name} is larger than {api.limits.upload_bytes / MIB:g} MiB; take a smaller")
                shutil.copyfile(source, target)
            fields = {name: _text(value) for name, value in given.items() if name not in _NO_SETTINGS}
            return api.take(place, parse_settings(fields))

    def cancel(self, shown: str, seen: Seen) -> list[Any]:
        with _shown_reasons():
            self._api.queue.cancel(shown)
        return self.look(shown, seen)

    def show(self, shown: str, seen: Seen, chosen: str | None) -> list[Any]:
        return self.look(chosen or shown, seen)

    def delete(self, shown: str, seen: Seen, chosen: str | None) -> list[Any]:
        with _shown_reasons():
            self._api.store.remove(chosen or "")
        return self.look(shown, seen)

    def take_up(self, chosen: str | None) -> list[Any]:
        """Fill the form in as a job was asked for, with its files."""
        with _shown_reasons():
            job = self._api.store.job(chosen or "")
            settings = Settings.model_validate(job.settings).model_dump()
            found = {**settings, "cond_rope_distance": str(settings["cond_rope_distance"]), "preset": None}
            place = self._api.store.place(job.id)
            found |= dict.fromkeys(FILES) | {path.name: self._copied(path) for path in place.sent(*FILES)}
            return [found[name] for name in FIELDS]
        return [gr.skip()] * len(FIELDS)

    def _copied(self, file: Path) -> str:
        """A copy for the form, with an ending that a browser asks for; it goes when others of the page do."""
        folder = self._api.store.folder / UPLOADS / new_id()
        folder.mkdir(mode=0o700)
        return str(shutil.copyfile(file, folder / f"{file.name}{_ENDINGS[file.name]}"))

    def compare(self, a: str | None, b: str | None) -> str:
        """A link to the page of the comparison."""
        with _shown_reasons():
            if not a or not b:
                raise Refused(422, "two videos are compared; choose both")
            self._api.comparer.page(a, b)
            return f'<a href="/api/compare/{a}/{b}" target="_blank">Open the comparison</a>'
        return ""

    def preset(self, name: str | None) -> list[Any]:
        found = next((each for each in self._api.presets_now().presets if each.name == name), None)
        return [gr.skip(), gr.skip()] if found is None else [found.size, found.infer_frames]


def _playing(job: Job | None) -> str:
    """What the player shows: it is put there anew only where this changes. A video that was begun while it was made
    goes on behind the job's end."""
    if job is None:
        return ""
    if job.progress.frames:
        return f"{job.id} frames"
    return f"{job.id} {job.state}"


def _text(value: Any) -> str:
    """As a form has it: "" is as if it were not there."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextlib.contextmanager
def _shown_reasons() -> Iterator[None]:
    try:
        yield
    except LowvramError as error:
        gr.Warning(str(error), title="Not done")
