"""The web application: its addresses, and their answers (docs/fingerprint_page.md)."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Collection, Iterator
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
from avcl_jax.fingerprint.index import FingerprintIndex, file_sha256
from avcl_jax.fingerprint.matching import CANDIDATES
from avcl_jax.fingerprint.settings import REQUIREMENTS
from avcl_jax.fingerprint.web import preview
from avcl_jax.fingerprint.web.decoder import Decoder, DecoderError
from avcl_jax.fingerprint.web.requests import clip_name, same_origin, uploaded

_STREAM = "application/x-ndjson"
_STYLE = Path(__file__).parents[2] / "style.css"  # of reports too
# Seconds that are converted before and after the part of a source that matches.
_MARGIN_SECONDS = 5.0


class FingerprintApp:
    """Endpoints that compare clips with an index, which may change meanwhile, and show sources."""

    def __init__(self, index: FingerprintIndex, directory: Path, options: argparse.Namespace):
        """Takes an opened index, whose encoders are loaded here: wrong ones are refused at once.

        Args:
            directory: existing directory for uploads and conversions.
            options: arguments of `serve`.
        """
        self._index = index
        self._directory = directory
        self._options = options
        self._max_upload_bytes = int(options.max_upload_mb * (1 << 20))
        self._shortest_seconds = index.segmenter.shortest_seconds
        self._present = 0  # clips that are received, wait, or are compared
        self._turn = asyncio.Lock()  # two comparisons at once would only take twice the memory
        self._thread = ThreadPoolExecutor(1, "fingerprint-query")
        self._thread.submit(index.segmenter.compile)
        limits = options.max_decode_seconds, directory
        self._clips, self._shown = Decoder(*limits), Decoder(*limits)
        self._previews = preview.PreviewCache(directory, self._shown)

    def starlette(self, hosts: Collection[str]) -> Starlette:
        """Returns the application, which answers under these names and under any address."""
        static = StaticFiles(packages=[("avcl_jax.fingerprint.web", "static")], html=True)
        return Starlette(
            routes=[
                Route("/style.css", lambda _: FileResponse(_STYLE)),
                Route("/api/status", self._status),
                Route("/api/query", self._query, methods=["POST"]),
                Route("/media/{id}", self._media),
                Route("/media/{id}/preview/{start:float}/{end:float}", self._preview),
                Route("/media/{id}/spectrogram/{start:float}/{end:float}", self._spectrogram),
                Route("/clips/{name}", self._clip),
                Mount("/", static),
            ],
            middleware=[Middleware(same_origin, hosts=hosts)],
            exception_handlers={HTTPException: _error, UserError: _error},
        )

    def close(self) -> None:
        """Ends the thread and the processes, also during a call."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._clips.close()
        self._shown.close()

    def _current(self) -> FingerprintIndex:
        self._index = self._index.reopened()
        return self._index

    def _part(self, request: Request) -> tuple[SourceRow, float, float]:
        """Returns the source and the interval of it that an address names."""
        id_, start, end = (request.path_params.get(name, 0.0) for name in ("id", "start", "end"))
        row = _by_id(self._current()).get(id_)
        if row is None:
            raise HTTPException(404, "the index has no such source now: ask again")
        return row, start, end

    async def _status(self, _: Request) -> Response:
        status: dict[str, Any] = {
            "index": str(self._index.directory),
            "max_upload_bytes": self._max_upload_bytes,
            "shortest_seconds": self._shortest_seconds,
            "max_seconds": self._options.max_seconds,
            "modalities": self._index.modalities,
        }
        try:
            index = self._current()
            status |= {"sources": len(index.sources()), "segments": index.num_segments}
            status["error"] = None if status["sources"] else _empty(index)
        except UserError as error:
            status["error"] = str(error)
        return JSONResponse(status)

    async def _query(self, request: Request) -> Response:
        lines = self._compare(request)
        # The first line comes after the upload, whose errors have their own status.
        line = await anext(lines)
        if _STREAM in request.headers.get("accept", ""):
            return StreamingResponse(_json_lines(line, lines), media_type=_STREAM)
        async for line in lines:  # noqa: B007
            pass
        return JSONResponse(line["answer"])

    async def _compare(self, request: Request) -> AsyncIterator[dict[str, Any]]:
        """Yields the stages of a query, and the answer at the end."""
        name, begin, before = clip_name(request), time.monotonic(), self._present
        if before > self._options.max_waiting:
            raise HTTPException(
                503,
                f"no clip is taken while {before} are compared or wait: try again in a minute",
            )
        require = request.query_params.get("require", "")
        if require and require not in REQUIREMENTS:
            names = ", ".join(REQUIREMENTS)
            raise HTTPException(400, f"require is {names} or left out, not {require[:100]}")
        required = REQUIREMENTS.get(require, ())
        self._present += 1
        try:
            async with uploaded(request, self._directory, self._max_upload_bytes) as path:
                yield {"stage": "waiting", "before": before}
                async with self._turn:
                    index = self._current()
                    if not index.num_segments:
                        raise HTTPException(409, _empty(index))
                    options = {"end_seconds": self._options.max_seconds, **index.segmenter.decoding}
                    yield {"stage": "decoding"}
                    try:
                        info = await self._clips.run(probe, path)
                        media = await self._clips.run(decode_media, path, **options)
                    except DecoderError as error:
                        # The message must not contain the place of the upload.
                        reason = str(error).replace(str(path), name)
                        message = f"{name} cannot be compared: {reason}. Give another file"
                        raise HTTPException(422, message) from error
                    if media.duration_seconds < (least := index.segmenter.shortest_seconds):
                        raise HTTPException(
                            422,
                            f"{name} lasts {media.duration_seconds:.2f} s, the shortest clip that "
                            f"can be found {least:.2f} s: give a longer one",
                        )
                    yield {"stage": "comparing"}
                    options = {"required": required, "content": file_sha256(path)}
                    query = self._thread.submit(index.query, media, count=CANDIDATES, **options)
                    try:
                        result = await asyncio.wrap_future(query)
                    except UserError as error:
                        raise HTTPException(422, f"{name}: {error}") from error
                rows = {row.name: row for row in index.sources()}
                candidates = [
                    await self._candidate(match, rows[match.source], result.query_seconds)
                    for match in result.matches
                ]
                kind, clip_url = await self._playable(path, result.query_seconds)
        finally:
            self._present -= 1
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
            "converted_url": clip_url,
            "spectrogram": None if info.video is not None else preview.spectrogram(*audio),
        }
        answer = {
            "clip": clip,
            "threshold": result.threshold,
            "required": required,
            "verdict": result.verdict,
            "at_most": CANDIDATES,
            "sources": result.sources,
            "match": None if result.best is None else candidates[result.matches.index(result.best)],
            "candidates": candidates,
            "elapsed_seconds": round(time.monotonic() - begin, 3),
        }
        yield {"answer": answer}

    async def _playable(self, path: Path, seconds: float) -> tuple[str | None, str | None]:
        """Returns the type of a clip and the address of its conversion, if it can and has to be."""
        # The clip was compared, so that only its rest is damaged: the match stands without it.
        with contextlib.suppress(DecoderError):
            kind = await self._shown.run(preview.playable_type, path)
            if kind is not None:
                return kind, None
            name = secrets.token_urlsafe(18)
            await self._previews.convert(name, path, 0.0, seconds)
            return "video/mp4", f"/clips/{name}"
        return None, None

    async def _candidate(self, match: Match, row: SourceRow, seconds: float) -> dict[str, Any]:
        """A match as the page shows it: with what plays beside the clip."""
        error = kind = None
        try:
            with _file_of(row) as path:
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
        row, *_ = self._part(request)
        with _file_of(row) as path:
            kind = await self._shown.run(preview.playable_type, path)
        if kind is None:
            raise HTTPException(415, f"browsers do not play {row.name}: ask for its /preview")
        return FileResponse(path, media_type=kind)

    async def _preview(self, request: Request) -> Response:
        row, start, end = self._part(request)
        with _file_of(row) as path:
            name = f"{row.content[:24]}-{start:.1f}-{end:.1f}"
            converted = await self._previews.convert(name, path, start, end)
        return FileResponse(converted, media_type="video/mp4")

    async def _spectrogram(self, request: Request) -> Response:
        row, start, end = self._part(request)
        rate = self._index.segmenter.decoding["sample_rate_hz"]
        interval = {"start_seconds": start, "end_seconds": min(end, start + preview.MAX_SECONDS)}
        with _file_of(row) as path:
            audio = await self._shown.run(decode_audio, path, sample_rate_hz=rate, **interval)
        if audio is None:
            raise HTTPException(422, f"{row.name} has no audio from {start:.1f} to {end:.1f} s")
        return JSONResponse(preview.spectrogram(audio.waveform, rate, audio.start_seconds))

    async def _clip(self, request: Request) -> Response:
        path = self._previews.get(request.path_params["name"])
        if path is None:
            raise HTTPException(404, "this clip is no longer kept: drop it again")
        return FileResponse(path, media_type="video/mp4")


def _id(row: SourceRow) -> str:
    """Returns the id of a source in addresses: it tells nothing, and leads to no other file."""
    return hashlib.sha256(f"{row.name}\0{row.content}".encode()).hexdigest()[:24]


@functools.lru_cache(1)  # a film that plays asks many times
def _by_id(index: FingerprintIndex) -> dict[str, SourceRow]:
    return {_id(row): row for row in index.sources()}


@contextlib.contextmanager
def _file_of(row: SourceRow) -> Iterator[Path]:
    """Opens a block that decodes the file of a source."""
    if row.path is None:
        raise HTTPException(404, f"{row.name} was indexed from memory: there is no file to show")
    path = Path(row.path)
    if not path.is_file():
        raise HTTPException(
            404, f"{path} is not there any more: put it back, or index it where it is now"
        )
    try:
        yield path
    except DecoderError as error:
        raise HTTPException(422, f"{row.name} cannot be shown: {error}") from error


def _empty(index: FingerprintIndex) -> str:
    return (
        f"the index {index.directory} is empty: add media with "
        f"`avcl-fingerprint add VIDEOS --index {index.directory}`"
    )


def _refusal(error: Exception) -> tuple[int, str]:
    """Returns the status and the message of an error; 500 if the index cannot be used."""
    if isinstance(error, HTTPException):
        return error.status_code, error.detail
    return 500, str(error)


async def _json_lines(
    line: dict[str, Any], lines: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[bytes]:
    yield json.dumps(line).encode() + b"\n"
    try:
        async for line in lines:
            yield json.dumps(line, allow_nan=False).encode() + b"\n"
    except (HTTPException, UserError) as error:
        status, message = _refusal(error)
        yield json.dumps({"error": message, "status": status}).encode() + b"\n"


async def _error(request: Request, error: Exception) -> Response:
    status, message = _refusal(error)
    # The body of a refused upload is not read to its end.
    headers = {"Connection": "close"} if request.method == "POST" else None
    return JSONResponse({"error": message}, status, headers)
