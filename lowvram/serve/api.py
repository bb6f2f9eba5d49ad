"""HTTP API: jobs are sent, watched, taken and cancelled; what it refuses has a reason."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lowvram.memory_log.drawing import draw
from lowvram.memory_log.rows import Row, read_rows
from lowvram.serve.comparing import Comparer, Pair
from lowvram.serve.docs_page import docs_page
from lowvram.serve.errors import Refused
from lowvram.serve.jobs import OPEN_STATES, Job
from lowvram.serve.presets import Presets
from lowvram.serve.queue import WorkQueue
from lowvram.serve.settings import Settings, checked, parse_settings
from lowvram.serve.store import FILES, NEEDED, Place
from lowvram.serve.streams import events, growing_video
from lowvram.serve.uploads import receive_form
from lowvram_kernels.errors import InputError, LowvramError

log = logging.getLogger(__name__)
_VIDEO = "video/mp4"
_MOST_ROWS = 2000
_FILES = {
    "image": "Portrait; of two people both, unless there is image2.",
    "audio": "Voice; of two people that of the left one, or of mask.",
    "image2": "Portrait of a second person, put beside the first; needs audio2.",
    "audio2": "Voice of a second person.",
    "mask": "As large as image, white where the first person is; needs mask2 and audio2.",
    "mask2": "The same of the second person.",
    "pose_video": "Video of a moving skeleton that is followed.",
}


class Api:
    """The operations, above one queue."""

    def __init__(self, queue: WorkQueue, presets: Callable[[], Presets]):
        self.queue, self.store, self.limits = queue, queue.store, queue.limits
        self.presets_now = presets
        self.comparer = Comparer(queue.store)
        self._checking = anyio.CapacityLimiter(1)  # a portrait may take a GB for a moment
        self.listening = 0

    def described(self, job: Job) -> dict[str, Any]:
        """A job as a client sees it."""
        here = f"/api/jobs/{job.id}"
        progress = dataclasses.asdict(job.progress) | {"share": job.progress.share}
        return {
            "id": job.id,
            "state": job.state,
            "reason": job.reason,
            "position": self.queue.position(job),
            "settings": job.settings,
            "progress": progress,
            "created": job.created,
            "started": job.started,
            "ended": job.ended,
            "links": {name: f"{here}/{name}" for name in ("events", "video", "portrait", "memory", "report")},
        }

    async def submit(self, request: Request) -> Response:
        """Queue a job. The form has the files `image` and `audio`, and the settings: each as a field of its own, or all
        of them in one field `settings` as JSON. A second person has a voice `audio2`, and stands in the same picture,
        whose halves, or `mask` and `mask2`, say who is where, or in `image2`; `pose_video` is followed."""
        with self.queue.reserved(), self.store.incoming() as place:
            files, kind = {name: place.file(name) for name in FILES}, request.headers.get("content-type")
            try:
                fields = await receive_form(kind, request.stream(), files, self.limits, needed=NEEDED)
            except ClientDisconnect as error:
                raise Refused(400, "the upload broke off; send it again") from error
            settings = parse_settings(fields)
            job = await anyio.to_thread.run_sync(self.take, place, settings, limiter=self._checking)
        return JSONResponse(self.described(job), status_code=202, headers={"location": f"/api/jobs/{job.id}"})

    def take(self, place: Place, settings: Settings) -> Job:
        """Check what lies in ``place`` and queue it; the place in the queue is the caller's.

        Raises:
            Refused: settings or a file that cannot be used.
        """
        settled = checked(settings, place, self.limits)
        return self.queue.add(place, settled.model_dump())

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs, the newest first."""
        return [self.described(job) for job in reversed(self.store.jobs())]

    def job(self, job_id: str) -> dict[str, Any]:
        """State, progress, seconds left, memory, settings, and why it failed."""
        return self.described(self.store.job(job_id))

    async def events(self, job_id: str) -> Response:
        """Server-sent events: `state` with the job, now, at each change, and at last of how it ended."""
        self.store.job(job_id)
        stream = self._listened(events(self.queue, job_id, self.described))
        return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def video(self, job_id: str) -> Response:
        """The video: of a job under way it comes as it is made, to its end; of another the file, also in parts
        (Range), and of one that was cancelled or broken off what there is of it."""
        job = self.store.job(job_id)
        if job.state in OPEN_STATES:
            stream = self._listened(growing_video(self.queue, job_id))
            return StreamingResponse(stream, media_type=_VIDEO, headers={"cache-control": "no-store"})
        if (path := self.store.place(job_id).watchable) is None:
            raise Refused(404, f"job {job_id} is {job.state}, and has no video{': ' if job.reason else ''}{job.reason}")
        return FileResponse(path, media_type=_VIDEO, headers={"cache-control": "no-cache"})

    def portrait(self, job_id: str) -> Response:
        """The portrait, small."""
        self.store.job(job_id)
        return self._file(self.store.place(job_id).thumbnail, job_id, "image/jpeg")

    def report(self, job_id: str) -> Response:
        """What `lowvram infer --report` writes; of a finished job."""
        job = self.store.job(job_id)
        path = self.store.place(job_id).outputs.report
        if path is None or not path.is_file():
            raise Refused(404, f"job {job_id} is {job.state}; a report is written when it is done")
        return FileResponse(path, media_type="application/json")

    def memory(self, job_id: str, after: Annotated[float, Query(ge=0, allow_inf_nan=False)] = 0.0) -> Response:
        """Rows of memory over time, as `lowvram infer --memory-log` writes them; those later than `after` seconds, of
        many the last 2000. Bytes."""
        rows = [dataclasses.asdict(row) for row in self.rows(job_id) if row.time_s > after or not after]
        return JSONResponse({"rows": rows[-_MOST_ROWS:]})

    def drawing(self, job_id: str) -> Response:
        """The same as a drawing, SVG."""
        if not (rows := self.rows(job_id)):
            raise Refused(404, f"job {job_id} has no rows of memory yet; it writes them while it is made")
        text = draw([("memory", rows)], title=f"Memory of job {job_id}")
        return Response(text, media_type="image/svg+xml", headers={"cache-control": "no-store"})

    def rows(self, job_id: str) -> list[Row]:
        """Those that are written, none where the job has not begun."""
        self.store.job(job_id)
        path = self.store.place(job_id).outputs.memory_log
        try:
            return read_rows(path) if path is not None else []
        except InputError:  # not there yet, or without a whole row
            return []

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a job: at once where it is queued, behind the block under way where it runs; what is made is kept."""
        return self.described(self.queue.cancel(job_id))

    def delete(self, job_id: str) -> Response:
        """Remove a job that is not under way, with all of its files."""
        self.store.remove(job_id)
        return Response(status_code=204)

    def presets(self) -> dict[str, Any]:
        """Settings that fit the card that is here, light, balanced and best, with what its plan predicts."""
        return self.presets_now().to_json()

    async def compare(self, pair: Pair) -> Response:
        """Compare the videos of two finished jobs, `a` with the baseline `b`; answers where the page is."""
        await anyio.to_thread.run_sync(self.comparer.page, pair.a, pair.b, limiter=self._checking)
        place = f"/api/compare/{pair.a}/{pair.b}"
        return JSONResponse({"page": place}, status_code=201, headers={"location": place})

    async def compared(self, a: str, b: str) -> Response:
        """The page of a comparison."""
        page = await anyio.to_thread.run_sync(self.comparer.page, a, b, limiter=self._checking)
        # It holds everything in itself, and says so to the browser in a policy of its own.
        policy = "default-src 'none'; img-src data:; media-src blob: data:; style-src 'unsafe-inline'; "
        headers = {"content-security-policy": policy + "script-src 'unsafe-inline'; frame-ancestors 'none'"}
        return HTMLResponse(page.read_text(encoding="utf-8"), headers=headers)

    def _file(self, path: Any, job_id: str, kind: str) -> Response:
        if not path.is_file():
            raise Refused(404, f"job {job_id} has no such file any more; send it anew")
        return FileResponse(path, media_type=kind)

    def _listened(self, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        if self.listening >= self.limits.listeners:
            raise Refused(429, f"{self.listening} events and videos are followed already; end one of them first")
        self.listening += 1
        return self._counted(stream)

    async def _counted(self, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for chunk in stream:
                yield chunk
        finally:
            self.listening -= 1


def make_app(queue: WorkQueue, presets: Callable[[], Presets]) -> tuple[FastAPI, Api]:
    """The API as an application, and what stands behind it; the page is mounted on it by who wants one."""
    app = FastAPI(
        title="lowvram",
        description="Talking-avatar videos from a portrait, a voice and a prompt.",
        docs_url=None,  # these load their scripts from elsewhere
        redoc_url=None,
        openapi_url="/api/openapi.json",
    )
    api = Api(queue, presets)
    router = APIRouter(prefix="/api")
    _routes(router, api)
    app.include_router(router)
    router_of_docs = APIRouter()
    router_of_docs.add_api_route(
        "/api/docs",
        lambda: HTMLResponse(docs_page(app.openapi())),
        include_in_schema=False,
        response_class=HTMLResponse,
    )
    app.include_router(router_of_docs)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(LowvramError, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _of_http)
    return app, api


def _routes(router: APIRouter, api: Api) -> None:
    one = "/jobs/{job_id}"
    reason = {"description": "Refused, with a reason.", "content": {"application/json": {"example": {"error": "..."}}}}

    def add(path: str, method: str, call: Callable[..., Any], **more: Any) -> None:
        router.add_api_route(path, call, methods=[method], responses={"4XX": reason}, **more)

    add("/jobs", "POST", api.submit, status_code=202, openapi_extra={"requestBody": _form()})
    add("/jobs", "GET", api.jobs)
    add(one, "GET", api.job)
    add(f"{one}/events", "GET", api.events, response_class=StreamingResponse)
    add(f"{one}/video", "GET", api.video, response_class=StreamingResponse)
    add(f"{one}/portrait", "GET", api.portrait, response_class=FileResponse)
    add(f"{one}/memory", "GET", api.memory)
    add(f"{one}/memory.svg", "GET", api.drawing, response_class=Response)
    add(f"{one}/report", "GET", api.report, response_class=FileResponse)
    add(f"{one}/cancel", "POST", api.cancel)
    add(one, "DELETE", api.delete, status_code=204)
    add("/presets", "GET", api.presets)
    add("/compare", "POST", api.compare, status_code=201)
    add("/compare/{a}/{b}", "GET", api.compared, response_class=HTMLResponse)


def _form() -> dict[str, Any]:
    """The form of ``submit`` for the schema: it is read as it comes, which FastAPI does not know of."""
    schema = Settings.model_json_schema()
    files = {name: {"type": "string", "format": "binary", "description": _FILES[name]} for name in FILES}
    fields = {**files, "settings": {"type": "string", "description": "All of them as JSON."}, **schema["properties"]}
    form = {"type": "object", "required": [*NEEDED, "prompt"], "properties": fields}
    return {"required": True, "content": {"multipart/form-data": {"schema": form}}}


async def _refused(request: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, Refused) else 500
    headers = {"retry-after": "10"} if status in (429, 503) else {}
    return _error(status, str(error), headers)


async def _failed(request: Request, error: Exception) -> Response:
    """What was raised on purpose and nobody made a refusal of: input that has to change, or a failure here."""
    wrong = isinstance(error, LowvramError) and error.exit_code == 2
    return _error(422 if wrong else 500, str(error))


async def _invalid(request: Request, error: Exception) -> Response:
    found = error.errors() if isinstance(error, RequestValidationError) else []
    said = "; ".join(f"{'.'.join(str(part) for part in each['loc'][1:])}: {each['msg']}" for each in found[:3])
    return _error(422, said or "the request cannot be used")


async def _of_http(request: Request, error: Exception) -> Response:
    status, said = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, str(error))
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    return _error(status, f"{request.method} {request.url.path[:80]}: {str(said).lower()}; see /api/docs", headers)


def _error(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": " ".join(reason.split())}, status_code=status, headers=headers)
