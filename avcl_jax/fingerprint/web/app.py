"""The web application: its addresses, and their answers (docs/fingerprint_page.md)."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import AsyncIterator, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from avcl_jax.data.media import decode_audio, decode_media, probe
from avcl_jax.errors import UserError
from avcl_jax.fingerprint.answer import Match
from avcl_jax.fingerprint.database import SourceRow
from avcl_jax.fingerprint.index import REQUIREMENTS, FingerprintIndex, file_sha256
from avcl_jax.fingerprint.matching import CANDIDATES
from avcl_jax.fingerprint.settings import FingerprintError
from avcl_jax.fingerprint.web import preview
from avcl_jax.fingerprint.web.decoder import Decoder, DecoderError
from avcl_jax.fingerprint.web.requests import SameOriginMiddleware, clip_name, uploaded
from avcl_jax.style import STYLE

_STREAM = "application/x-ndjson"
# Seconds that are converted before and after the part of a source that matches.
_MARGIN_SECONDS = 5.0
_UNREAD = {"Connection": "close"}  # of a request whose body is not read to its end
Lines = asyncio.Queue[dict[str, Any]]


class FingerprintApp:
    """Endpoints that compare clips with an index, which may change meanwhile, and show sources."""

    def __init__(
        self,
        index: FingerprintIndex,
        *,
        directory: Path,
        max_upload_bytes: int,
        max_seconds: float,
        max_decode_seconds: float,
        max_waiting: int,
    ):
        """Takes an opened index.

        Args:
            index: index whose encoders are loaded here, so that wrong ones are refused at once.
            directory: existing directory for uploads and conversions.
            max_upload_bytes: length of a clip.
            max_seconds: seconds of a clip that are compared, from its beginning.
            max_decode_seconds: seconds that decoding or converting a clip may take.
            max_waiting: clips that may wait while one is compared.
        """
        self._index = index
        self._directory = directory
        self._max_upload_bytes = max_upload_bytes
        self._max_seconds = max_seconds
        self._max_waiting = max_waiting
        self._shortest_seconds = index.segmenter.shortest_seconds
        self._waiting = 0
        self._turn = asyncio.Lock()  # two comparisons at once would only take twice the memory
        self._thread = ThreadPoolExecutor(1, "fingerprint-query")
        self._thread.submit(index.segmenter.compile)
        self._clips, self._shown = Decoder(max_decode_seconds), Decoder(max_decode_seconds)
        self._previews = preview.PreviewCache(directory, self._shown)
        self._tasks: set[asyncio.Task[None]] = set()

    def starlette(self, hosts: Collection[str]) -> Starlette:
        """Returns the application, which answers under these names and under any address."""
        static = StaticFiles(packages=[("avcl_jax.fingerprint.web", "static")], html=True)
        return Starlette(
            routes=[
                Route("/style.css", self._style),
                Route("/api/status", self._status),
                Route("/api/query", self._query, methods=["POST"]),
                Route("/media/{id}", self._media),
                Route("/media/{id}/preview/{start:float}/{end:float}", self._preview),
                Route("/media/{id}/spectrogram/{start:float}/{end:float}", self._spectrogram),
                Route("/clips/{name}", self._clip),
                Mount("/", static),
            ],
            middleware=[Middleware(SameOriginMiddleware, hosts=hosts)],
            exception_handlers={HTTPException: _error},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self._thread.shutdown(wait=False, cancel_futures=True)
        for decoder in (self._clips, self._shown):
            decoder.close()

    def _current(self) -> FingerprintIndex:
        try:
            self._index = self._index.reopened()
        except FingerprintError as error:
            raise HTTPException(500, str(error)) from error
        return self._index

    def _source(self, request: Request) -> SourceRow:
        row = _by_id(self._current()).get(request.path_params["id"])
        if row is None:
            raise HTTPException(404, "the index has no such source now: ask again")
        return row

    async def _style(self, _: Request) -> Response:
        return Response(STYLE, media_type="text/css")

    async def _status(self, _: Request) -> Response:
        status = {
            "index": str(self._index.directory),
            "max_upload_bytes": self._max_upload_bytes,
            "shortest_seconds": self._shortest_seconds,
            "max_seconds": self._max_seconds,
            "modalities": self._index.modalities,
            "error": None,
        }
        try:
            index = self._current()
            seconds = [row.duration_seconds for row in index.sources()]
            status |= {"sources": len(seconds), "segments": index.num_segments}
            status |= {"hours": sum(seconds) / 3600, "error": None if seconds else _empty(index)}
        except HTTPException as exception:
            status["error"] = exception.detail
        return JSONResponse(status)

    async def _query(self, request: Request) -> Response:
        lines: Lines = asyncio.Queue()
        # The clip is compared, and then deleted, whether or not somebody still listens.
        task = asyncio.create_task(self._answer(request, lines))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        line = await lines.get()
        if _STREAM in request.headers.get("accept", "") and "error" not in line:
            return StreamingResponse(_json_lines(line, lines), media_type=_STREAM)
        while "stage" in line:
            line = await lines.get()
        if "error" in line:
            return JSONResponse({"error": line["error"]}, line["status"], _UNREAD)
        return JSONResponse(line["answer"])

    async def _answer(self, request: Request, lines: Lines) -> None:
        """Receives a clip and compares it; the last line has the answer, or an error."""
        name, begin = clip_name(request), time.monotonic()
        last: dict[str, Any] = {"error": f"the server failed at {name}: see its log", "status": 500}
        self._waiting += 1
        try:
            if self._waiting > 1 + self._max_waiting:
                raise HTTPException(
                    503,
                    f"{self._waiting - 1} clips are being compared or wait, no more are taken: try "
                    "again in a minute",
                )
            before, required = self._waiting - 1, _required(request)
            async with uploaded(request, self._directory, self._max_upload_bytes) as path:
                lines.put_nowait({"stage": "waiting", "before": before})
                answer = await self._compare(path, name, required, lines)
            last = {"answer": answer | {"elapsed_seconds": round(time.monotonic() - begin, 3)}}
        except HTTPException as exception:
            last = {"error": exception.detail, "status": exception.status_code}
        finally:  # also after an error of ours, which the log of the server then has
            self._waiting -= 1
            lines.put_nowait(last)

    async def _compare(
        self, path: Path, name: str, required: tuple[str, ...], lines: Lines
    ) -> dict[str, Any]:
        async with self._turn:
            index = self._current()
            if not index.num_segments:
                raise HTTPException(409, _empty(index))
            try:
                segmenter = index.segmenter
            except UserError as error:
                raise HTTPException(500, str(error)) from error
            lines.put_nowait({"stage": "decoding"})
            try:
                info = await self._clips.run(probe, path)
                options = {"end_seconds": self._max_seconds, **segmenter.decoding}
                media = await self._clips.run(decode_media, path, **options)
            except DecoderError as error:
                # The message must not contain the place of the upload.
                reason = str(error).replace(str(path), name)
                message = f"{name} cannot be compared: {reason}. Give another file"
                raise HTTPException(422, message) from error
            if media.duration_seconds < segmenter.shortest_seconds:
                raise HTTPException(
                    422,
                    f"{name} lasts {media.duration_seconds:.2f} s, the shortest clip that can be "
                    f"found {segmenter.shortest_seconds:.2f} s: give a longer one",
                )
            lines.put_nowait({"stage": "comparing"})
            content = file_sha256(path)
            options = {"count": CANDIDATES, "required": required, "content": content}
            query = functools.partial(index.query, media, **options)
            try:
                result = await asyncio.get_running_loop().run_in_executor(self._thread, query)
            except FingerprintError as error:
                raise HTTPException(422, f"{name}: {error}") from error
        rows = {row.name: row for row in index.sources()}
        found = [
            await self._candidate(match, rows[match.source], result.query_seconds)
            for match in result.matches
        ]
        kind, converted = await self._previews.convert_clip(path, result.query_seconds)
        audio = media.waveform, media.sample_rate_hz, media.audio_start_seconds
        clip = {
            "name": name,
            "seconds": info.duration_seconds,
            "compared_seconds": result.query_seconds,
            "has_video": info.video is not None,
            "has_audio": info.audio is not None,
            "empty": result.empty,
            "remark": result.remark,
            "type": kind,
            "converted_url": converted and f"/clips/{converted}",
            "spectrogram": None if info.video is not None else preview.spectrogram(*audio),
        }
        return {
            "clip": clip,
            "threshold": result.threshold,
            "required": required,
            "verdict": result.verdict,
            "at_most": CANDIDATES,
            "sources": result.sources,
            "match": None if result.best is None else found[result.matches.index(result.best)],
            "candidates": found,
        }

    async def _candidate(self, match: Match, row: SourceRow, seconds: float) -> dict[str, Any]:
        """A match as the page shows it: with what plays beside the clip."""
        error = kind = None
        try:
            with preview.source_file(row) as path:
                kind = await self._shown.run(preview.playable_type, path)
        except HTTPException as exception:
            error = exception.detail
        begin = max(0.0, match.offset_seconds - _MARGIN_SECONDS)
        end = match.offset_seconds + match.rate * seconds + _MARGIN_SECONDS
        end = min(row.duration_seconds, end, begin + preview.MAX_SECONDS)
        address, interval = f"/media/{_id(row)}", f"{begin:.1f}/{end:.1f}"
        media = {
            # Of a file that browsers play; of any other there is only the converted part.
            "url": kind and address,
            "converted_url": f"{address}/preview/{interval}",
            "converted_start_seconds": round(begin, 1),
            "spectrogram_url": f"{address}/spectrogram/{interval}",
            "error": error,
        }
        own = {"id": _id(row), "title": PurePath(row.name).name, "what_matched": match.what_matched}
        return dataclasses.asdict(match) | own | {"media": media}

    async def _media(self, request: Request) -> Response:
        row = self._source(request)
        with preview.source_file(row) as path:
            kind = await self._shown.run(preview.playable_type, path)
        if kind is None:
            raise HTTPException(415, f"browsers do not play {row.name}: ask for its /preview")
        return FileResponse(path, media_type=kind)

    async def _preview(self, request: Request) -> Response:
        row, parameters = self._source(request), request.path_params
        path = await self._previews.convert_source(row, parameters["start"], parameters["end"])
        return FileResponse(path, media_type="video/mp4")

    async def _spectrogram(self, request: Request) -> Response:
        row, start = self._source(request), request.path_params["start"]
        end = min(request.path_params["end"], start + preview.MAX_SECONDS)
        rate = self._index.segmenter.decoding["sample_rate_hz"]
        interval = {"start_seconds": start, "end_seconds": end}
        with preview.source_file(row) as path:
            audio = await self._shown.run(decode_audio, path, sample_rate_hz=rate, **interval)
        if audio is None:
            raise HTTPException(422, f"{row.name} has no audio from {start:.1f} to {end:.1f} s")
        return JSONResponse(preview.spectrogram(audio.waveform, rate, audio.start_seconds))

    async def _clip(self, request: Request) -> Response:
        return FileResponse(self._previews.get(request.path_params["name"]), media_type="video/mp4")


def _id(row: SourceRow) -> str:
    """Returns the id of a source in addresses: it tells nothing, and leads to no other file."""
    return hashlib.sha256(f"{row.name}\0{row.content}".encode()).hexdigest()[:24]


@functools.lru_cache(1)  # a film that plays asks many times
def _by_id(index: FingerprintIndex) -> dict[str, SourceRow]:
    return {_id(row): row for row in index.sources()}


def _required(request: Request) -> tuple[str, ...]:
    name = request.query_params.get("require", "")
    if name and name not in REQUIREMENTS:
        names = ", ".join(REQUIREMENTS)
        raise HTTPException(400, f"require is {names} or left out, not {name[:100]}")
    return REQUIREMENTS[name] if name else ()


def _empty(index: FingerprintIndex) -> str:
    return (
        f"the index {index.directory} is empty: add media with "
        f"`avcl-fingerprint add VIDEOS --index {index.directory}`"
    )


async def _json_lines(line: dict[str, Any], lines: Lines) -> AsyncIterator[bytes]:
    yield json.dumps(line).encode() + b"\n"
    while "stage" in line:
        line = await lines.get()
        yield json.dumps(line, allow_nan=False).encode() + b"\n"


async def _error(_: Request, exception: Exception) -> Response:
    assert isinstance(exception, HTTPException)
    return JSONResponse({"error": exception.detail}, exception.status_code)
