"""Checks of requests: the name of this machine, the page that asks, and the size of a clip."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import re
import tempfile
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_IDLE_SECONDS = 60.0
_MEGABYTE = 1 << 20
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; media-src 'self' blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def same_origin(app: ASGIApp, hosts: Collection[str]) -> ASGIApp:
    """Refuses foreign names of this machine and pages of other sites, and sets headers.

    A page whose name is made to point at this machine (DNS rebinding) sends its own name as Host.
    Unlike Starlette's TrustedHostMiddleware this one takes every address, as no name server decides
    where that leads.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        problem = _problem(scope, hosts) if scope["type"] == "http" else None
        answering = app if problem is None else JSONResponse({"error": problem}, 403)
        await answering(scope, receive, send_with_headers)

    return answer


def _problem(scope: Scope, hosts: Collection[str]) -> str | None:
    headers = Headers(scope=scope)
    host = headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name not in hosts:
            ipaddress.ip_address(name)
    except ValueError:
        return (
            f"Host {host[:100]!r} is not this server: open it by its address, http://127.0.0.1 "
            "with its port, or by localhost"
        )
    writes = scope["method"] not in ("GET", "HEAD")
    foreign = writes and headers.get("origin") not in (None, f"http://{host}")
    linked = headers.get("sec-fetch-site") in ("cross-site", "same-site")
    if foreign or (linked and scope["path"] != "/"):
        return "another site's page asks: only this server's own page may"
    return None


@contextlib.asynccontextmanager
async def uploaded(request: Request, directory: Path, limit: int) -> AsyncIterator[Path]:
    """Writes the body of a request to a file that exists as long as the block lasts.

    Starlette's forms have no limit for a file, and write it whole before they tell its length.

    Args:
        limit: bytes of a clip; a longer one is refused, unread where its length is announced.

    Raises:
        HTTPException: if it is too long or empty, does not arrive, or does not fit on the disk.
    """
    name = clip_name(request)
    size = announced = int(request.headers.get("content-length", 0))
    # FFmpeg knows some formats by their endings only.
    ending = re.search(r"\.[a-z0-9]{1,8}$", name.lower())
    suffix = ending[0] if ending else ""
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix="clip-", suffix=suffix) as file:
            chunks = request.stream()
            while size <= limit:
                async with asyncio.timeout(_IDLE_SECONDS):
                    chunk = await anext(chunks, b"")
                if not chunk:
                    break
                file.write(chunk)
                size = max(announced, file.tell())
            file.flush()
            if size > limit:
                raise HTTPException(
                    413,
                    f"the clip has {size / _MEGABYTE:.4g} MB, at most {limit / _MEGABYTE:g} MB "
                    "are taken: cut it, or start the server with a larger --max-upload-mb",
                )
            if not size:
                raise HTTPException(400, f"{name} is empty, 0 bytes: choose another file")
            yield Path(file.name)
    except TimeoutError as error:
        message = f"nothing of {name} arrived for {_IDLE_SECONDS:.0f} s: send it again"
        raise HTTPException(408, message) from error
    except ClientDisconnect as error:
        message = f"the upload of {name} was broken off: send it again"
        raise HTTPException(400, message) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        message = f"the disk of {directory} is full: free some space, or set TMPDIR"
        raise HTTPException(507, message) from error


def clip_name(request: Request) -> str:
    """Returns the name that the sender gave the clip, fit to be shown and for nothing else."""
    name = re.split(r"[/\\]", request.query_params.get("name", ""))[-1]
    return "".join(c for c in name if c.isprintable()).strip()[:200] or "the clip"
