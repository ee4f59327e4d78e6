"""The web application: its addresses, and what they answer (docs/fingerprint_page.md)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Collection
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from avcl_jax.fingerprint.index import REQUIREMENTS
from avcl_jax.fingerprint.web.describe import describe_answer
from avcl_jax.fingerprint.web.desk import Desk
from avcl_jax.fingerprint.web.refusal import Refusal
from avcl_jax.fingerprint.web.safety import Safety
from avcl_jax.fingerprint.web.shelf import Shelf
from avcl_jax.fingerprint.web.upload import clip_name, received
from avcl_jax.style import STYLE

_STATIC = {
    "format.js": "text/javascript",
    "page.js": "text/javascript",
    "player.js": "text/javascript",
    "timeline.js": "text/javascript",
    "sound.js": "text/javascript",
}
_STREAM = "application/x-ndjson"


class Site:
    """Answers requests about one index."""

    def __init__(self, desk: Desk, shelf: Shelf, *, directory: Path, max_upload_bytes: int):
        """Takes what compares, what shows, and a directory for uploads."""
        self._desk = desk
        self._shelf = shelf
        self._directory = directory
        self._max_upload_bytes = max_upload_bytes
        self._tasks: set[asyncio.Task[None]] = set()

    def application(self, names: Collection[str]) -> Starlette:
        """Returns the application.

        Args:
            names: of this machine, under which it may be asked for.
        """
        return Starlette(
            routes=[
                Route("/", self._page),
                Route("/page.css", self._style),
                *(Route(f"/{name}", self._script) for name in _STATIC),
                Route("/api/status", self._status),
                Route("/api/query", self._query, methods=["POST"]),
                Route("/api/sources/{id}/sound", self._sound),
                Route("/media/{id}", self._media),
                Route("/media/{id}/preview", self._preview),
                Route("/clips/{name}", self._clip),
            ],
            middleware=[Middleware(Safety, names=names)],
            exception_handlers={Refusal: _refuse, 404: _not_found, 405: _not_found},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._desk.warm_up()
        yield
        self._desk.close()
        self._shelf.close()

    async def _page(self, _: Request) -> Response:
        return Response(_file("page.html"), media_type="text/html; charset=utf-8")

    async def _style(self, _: Request) -> Response:
        return Response(STYLE.encode() + _file("page.css"), media_type="text/css")

    async def _script(self, request: Request) -> Response:
        name = request.url.path.lstrip("/")
        return Response(_file(name), media_type=_STATIC[name])

    async def _status(self, _: Request) -> Response:
        status: dict[str, Any] = {
            "index": str(self._desk.directory),
            "max_upload_bytes": self._max_upload_bytes,
            "shortest_seconds": self._desk.shortest_seconds,
            "max_seconds": self._desk.max_seconds,
            "modalities": self._desk.modalities,
        }
        try:
            sources = self._desk.sources()
            status |= {"sources": len(sources), "segments": self._desk.num_segments()}
            status["hours"] = sum(row.duration_seconds for row in sources.values()) / 3600
            status["error"] = None if sources else self._desk.empty_message
        except Refusal as refusal:
            status["error"] = refusal.message
        return JSONResponse(status)

    async def _query(self, request: Request) -> Response:
        name, required = clip_name(request), _required(request)
        lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        async with contextlib.AsyncExitStack() as stack:
            before = stack.enter_context(self._desk.place())
            path = await stack.enter_async_context(
                received(request, self._directory, self._max_upload_bytes)
            )
            # The clip is compared, and then deleted, whether or not somebody still listens.
            task = asyncio.create_task(self._compare(path, name, required, lines, stack.pop_all()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        lines.put_nowait({"stage": "waiting", "before": before})
        if _STREAM in request.headers.get("accept", ""):
            return StreamingResponse(_written(lines), media_type=_STREAM)
        last: dict[str, Any] = {}
        while (line := await lines.get()) is not None:
            last = line
        if "error" in last:
            return JSONResponse({"error": last["error"]}, last["status"])
        return JSONResponse(last["answer"])

    async def _compare(
        self,
        path: Path,
        name: str,
        required: tuple[str, ...],
        lines: asyncio.Queue[dict[str, Any] | None],
        stack: contextlib.AsyncExitStack,
    ) -> None:
        loop = asyncio.get_running_loop()

        def report(stage: str) -> None:
            loop.call_soon_threadsafe(lines.put_nowait, {"stage": stage})

        begin = time.monotonic()
        last: dict[str, Any] = {
            "error": f"the server failed at {name}: its log says how, and it goes on",
            "status": 500,
        }
        try:
            async with stack:
                answer = await self._desk.ask(path, name, required, report)
                clip = await self._shelf.of_clip(path, answer.media.duration_seconds)
            types: dict[str, str | Refusal | None] = {}
            for source, row in answer.sources.items():
                try:
                    types[source] = await self._shelf.type_of(row)
                except Refusal as refusal:
                    types[source] = refusal
            described = describe_answer(answer, name, clip, types)
            described["elapsed_seconds"] = round(time.monotonic() - begin, 3)
            last = {"answer": described}
        except Refusal as refusal:
            last = {"error": refusal.message, "status": refusal.status}
        finally:
            # Also after an error of ours, which the log of the server then has.
            lines.put_nowait(last)
            lines.put_nowait(None)

    async def _sound(self, request: Request) -> Response:
        row = self._source(request)
        start, end = _interval(request, row.duration_seconds)
        return JSONResponse(await self._shelf.sound_of(row, start, end, self._desk.sample_rate_hz))

    async def _media(self, request: Request) -> Response:
        row = self._source(request)
        kind = await self._shelf.type_of(row)
        if kind is None:
            raise Refusal(415, f"browsers do not play {row.name}: ask for its /preview")
        return FileResponse(str(row.path), media_type=kind)

    async def _preview(self, request: Request) -> Response:
        row = self._source(request)
        start, end = _interval(request, row.duration_seconds)
        path, kind = await self._shelf.of_source(row, start, end)
        return FileResponse(path, media_type=kind)

    async def _clip(self, request: Request) -> Response:
        path = self._shelf.get(request.path_params["name"])
        if path is None:
            raise Refusal(404, "this clip is no longer kept: drop it again")
        return FileResponse(path, media_type="video/mp4")

    def _source(self, request: Request) -> Any:
        row = self._desk.sources().get(request.path_params["id"])
        if row is None:
            raise Refusal(404, "the index has no such source now: ask again")
        return row


async def _written(lines: asyncio.Queue[dict[str, Any] | None]) -> AsyncIterator[bytes]:
    while (line := await lines.get()) is not None:
        yield json.dumps(line, allow_nan=False).encode() + b"\n"


def _required(request: Request) -> tuple[str, ...]:
    name = request.query_params.get("require", "")
    if name and name not in REQUIREMENTS:
        raise Refusal(400, f"require is {', '.join(REQUIREMENTS)} or left out, not {name[:100]}")
    return REQUIREMENTS[name] if name else ()


def _interval(request: Request, duration: float) -> tuple[float, float]:
    try:
        start = float(request.query_params.get("start", 0))
        end = float(request.query_params.get("end", duration))
    except ValueError as error:
        raise Refusal(400, "start and end are seconds: give numbers") from error
    if not (math.isfinite(end) and 0 <= start < end):
        raise Refusal(400, f"there is nothing from {start} to {end} s: give 0 <= start < end")
    return start, end


def _file(name: str) -> bytes:
    return (resources.files("avcl_jax.fingerprint.web") / name).read_bytes()


def _refuse(_: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    # The rest of a body that is refused is not read: the connection ends here.
    headers = {"Connection": "close"} if refusal.status in (413, 503, 507) else {}
    return JSONResponse({"error": refusal.message}, refusal.status, headers)


def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    message = f"there is no {request.method} {request.url.path[:100]} here"
    return JSONResponse({"error": message}, status)
