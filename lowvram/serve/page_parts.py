"""Parts of the page as HTML: player, progress, memory, history. What a client wrote is escaped."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Sequence
from html import escape

from lowvram.byte_sizes import gib
from lowvram.memory_log.drawing import draw
from lowvram.memory_log.rows import Row
from lowvram.serve.jobs import OPEN_STATES, QUEUED, RUNNING, Job
from lowvram.serve.presets import Preset, Presets

_SHOWN = 30
_BEGINS = "if(!this.dataset.begun){this.dataset.begun=1;this.play().catch(()=>{})}"
"""With the first frames: a browser itself waits until it thinks that it will come to the end without a pause."""
_ENDED = "if(!this.dataset.whole){this.dataset.whole=1;this.src=this.src.split('?')[0]+'?whole'}"
"""Behind the end of a video that was shown as it was made the finished one takes its place: it can be wound."""


def player(job: Job | None) -> str:
    """The video, which begins to play as soon as there is some of it."""
    if job is None:
        return _stage("Give a portrait, a voice and a prompt.")
    if job.state == QUEUED or (job.state == RUNNING and not job.progress.frames):
        return _stage(
            "The first frames are on their way." if job.state == RUNNING else "Waits for the video before it."
        )
    if not job.progress.frames:
        return _stage(f"No video: {job.reason or job.state}.")
    place = f"/api/jobs/{job.id}/video"
    playing = f'oncanplay="{_BEGINS}" onended="{_ENDED}"' if job.state in OPEN_STATES else 'data-whole="1"'
    return f'<div class="lv-stage"><video id="lv-video" controls playsinline {playing} src="{place}"></video></div>'


def _stage(text: str) -> str:
    return f'<div class="lv-stage"><p>{escape(text)}</p></div>'


def progress(job: Job | None, position: int | None) -> str:
    """A bar, and beside it how far, how long still, and memory."""
    if job is None:
        return _bar(0.0, "", "Nothing is being made.")
    now = job.progress
    if job.state == QUEUED:
        return _bar(0.0, "", f"Queued: {position} before it.")
    words = [
        f"{now.frames} of {now.total_frames} frames" if now.total_frames else "portrait, voice and prompt are read"
    ]
    if job.state == RUNNING:
        if now.seconds_left is not None:
            words.append(f"{duration(now.seconds_left)} left")
        words += [f"{name} {gib(size)}" for name, size in _memory(job)]
        state = "ending" if job.reason else "making"
        return _bar(now.share, state, ", ".join(words))
    took = f" in {duration(job.ended - job.started)}" if job.ended and job.started else ""
    reason = "" if job.reason in ("", job.state) else f": {job.reason}"
    return _bar(
        now.share, job.state, f"{job.state.capitalize()}{took}, {words[0] if now.frames else 'no frame'}{reason}"
    )


def _memory(job: Job) -> list[tuple[str, int]]:
    names = {"reserved": "GPU", "rss": "host"}
    return [(name, job.progress.memory[key]) for key, name in names.items() if key in job.progress.memory]


def _bar(share: float, state: str, text: str) -> str:
    kind = state.replace(" ", "-")
    return (
        f'<div class="lv-progress {kind}" data-state="{escape(state)}"><div class="lv-bar">'
        f'<div style="width:{100 * share:.1f}%"></div></div><p>{escape(text)}</p></div>'
    )


def memory(rows: Sequence[Row]) -> str:
    """Memory over time, as an image of its own: its styles stay in it."""
    if not rows:
        return '<p class="lv-faint">Memory over time is drawn here while a video is made.</p>'
    drawn = base64.b64encode(draw([("", rows)], title="Memory over time").encode()).decode()
    return f'<img class="lv-memory" alt="Memory over time" src="data:image/svg+xml;base64,{drawn}">'


def history(jobs: Sequence[Job]) -> str:
    """The newest first."""
    if not jobs:
        return '<p class="lv-faint">Videos that were made are listed here.</p>'
    rows = "".join(_row(job) for job in list(reversed(jobs))[:_SHOWN])
    more = f'<p class="lv-faint">{len(jobs) - _SHOWN} older ones are not shown.</p>' if len(jobs) > _SHOWN else ""
    head = "".join(f"<th>{name}</th>" for name in ("", "Prompt", "Size", "Frames", "Took", "State", "When"))
    return f'<table class="lv-history"><tr>{head}</tr>{rows}</table>{more}'


def _row(job: Job) -> str:
    took = duration(job.ended - job.started) if job.ended and job.started else ""
    state = f'<span class="lv-state {job.state.replace(" ", "-")}">{job.state}</span>'
    why = f' title="{escape(job.reason)}"' if job.reason else ""
    cells = [
        f'<img alt="" loading="lazy" src="/api/jobs/{job.id}/portrait">',
        escape(short(str(job.settings.get("prompt", "")), 70)),
        escape(str(job.settings.get("size", ""))),
        str(job.progress.frames or ""),
        took,
        state,
        moment(job.created),
    ]
    return f'<tr data-job="{job.id}"{why}>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def choice(job: Job) -> tuple[str, str]:
    """As it stands in a list to choose from: its words, and its id."""
    return f"{moment(job.created)}  {short(str(job.settings.get('prompt', '')), 40)}  ({job.state})", job.id


def presets(found: Presets) -> list[tuple[str, str]]:
    """Words and name of each."""
    return [(_preset(each), each.name) for each in found.presets]


def _preset(preset: Preset) -> str:
    if preset.frames_per_second is None:
        return f"{preset.name}: {preset.size}"
    predicted = f"{preset.frames_per_second:.1f} frames/s"
    if preset.vram_bytes is not None:
        predicted += f", {gib(preset.vram_bytes)}"
    return f"{preset.name}: {preset.size}, {predicted}"


def short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def moment(seconds: float) -> str:
    """Local time: today's without the day."""
    there = datetime.datetime.fromtimestamp(seconds)
    today = there.date() == datetime.date.today()
    return there.strftime("%H:%M" if today else "%Y-%m-%d %H:%M")


def duration(seconds: float) -> str:
    """As "45 s", "3 min 05 s" or "1 h 02 min"."""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
