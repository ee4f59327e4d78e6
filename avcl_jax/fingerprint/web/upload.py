"""An uploaded clip to a file, with an end to its size and to the patience for it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.requests import ClientDisconnect, Request

from avcl_jax.fingerprint.web.refusal import Refusal

# Left to the rest of the machine.
_KEEP_FREE_BYTES = 256 << 20
_IDLE_SECONDS = 60.0
_MEGABYTE = 1 << 20


@contextlib.asynccontextmanager
async def received(request: Request, directory: Path, limit_bytes: int) -> AsyncIterator[Path]:
    """Writes a request's body to a file that exists as long as the block lasts.

    Args:
        request: its body is the clip, as it is.
        directory: for the file.
        limit_bytes: a longer body is refused, unread where its length was announced.

    Raises:
        Refusal: if it is too long, empty, does not arrive, or does not fit on the disk.
    """
    announced = request.headers.get("content-length", "")
    expected = int(announced) if announced.isdecimal() else 0
    if expected > limit_bytes:
        raise _too_large(f"{expected / _MEGABYTE:.0f} MB", limit_bytes)
    free = shutil.disk_usage(directory).free - _KEEP_FREE_BYTES
    # A body of unannounced length may become as long as is allowed.
    if free < (expected if announced else limit_bytes):
        raise _no_space(directory)
    name = clip_name(request)
    suffix = Path(name).suffix.lower()
    # FFmpeg knows some formats by their endings only.
    suffix = suffix if re.fullmatch(r"\.[a-z0-9]{1,8}", suffix) else ""
    with tempfile.NamedTemporaryFile(dir=directory, prefix="clip-", suffix=suffix) as file:
        size = 0
        now = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(_IDLE_SECONDS) as patience:
                async for chunk in request.stream():
                    patience.reschedule(now() + _IDLE_SECONDS)
                    size += len(chunk)
                    if size > limit_bytes:
                        raise _too_large(f"more than {limit_bytes / _MEGABYTE:g} MB", limit_bytes)
                    file.write(chunk)
            file.flush()
        except TimeoutError as error:
            raise Refusal(
                408, f"nothing of {name} arrived for {_IDLE_SECONDS:.0f} s: send it again"
            ) from error
        except ClientDisconnect as error:
            raise Refusal(400, f"the upload of {name} was broken off: send it again") from error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise _no_space(directory) from error
        if not size:
            raise Refusal(400, f"{name} is empty, 0 bytes: choose another file")
        yield Path(file.name)


def clip_name(request: Request) -> str:
    """Returns the name that the sender gave the clip, fit to be shown and for nothing else."""
    name = re.split(r"[/\\]", request.query_params.get("name", ""))[-1]
    return "".join(c for c in name if c.isprintable()).strip()[:200] or "the clip"


def _too_large(size: str, limit_bytes: int) -> Refusal:
    return Refusal(
        413,
        f"the clip has {size}, at most {limit_bytes / _MEGABYTE:g} MB are taken: cut it, or start "
        "the server with a larger --max-upload-mb",
    )


def _no_space(directory: Path) -> Refusal:
    return Refusal(
        507, f"the disk of {directory} is almost full: free some space, or set TMPDIR elsewhere"
    )
