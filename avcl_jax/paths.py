"""Paths that users give, as every library can use them, and files written whole or not at all.

Orbax returns nothing for a relative path, a program started in another directory does not find one,
and no library expands `~`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

from avcl_jax.errors import UserError

AnyPath = TypeVar("AnyPath", Path, epath.Path)


class PathError(UserError, argparse.ArgumentTypeError):
    """A path that cannot be used: an empty one, or a remote one where it must be local."""


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether a path is in an object store (gs://, s3://)."""
    return "://" in os.fspath(path)


def store_of(path: epath.PathLike) -> tuple[Any, str]:
    """Returns fsspec's file system of a remote path, and the path within it."""
    import fsspec

    found: tuple[Any, str] = fsspec.core.url_to_fs(os.fspath(path))
    return found


def ask_stores_anew() -> None:
    """Lets clients of stores that are opened from now on keep no listings of folders.

    They would not show what other processes write.
    """
    import fsspec

    for protocol in ("gs", "gcs", "s3", "s3a"):
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False


def absolute_path(path: epath.PathLike) -> epath.Path:
    """Returns a local path with `~` expanded, absolute; one in an object store as it is.

    Raises:
        PathError: if the path is empty, which would silently be the current folder.
    """
    text = os.fspath(path)
    if not text:
        raise PathError("a path is empty")
    return epath.Path(text if is_remote(text) else os.path.abspath(os.path.expanduser(text)))


def local_path(path: epath.PathLike) -> Path:
    """Returns the absolute path of a local file or folder; the type of command-line arguments.

    Raises:
        PathError: if the path is in an object store.
    """
    if is_remote(path):
        raise PathError(f"{path} must be local: copy it to a local disk first")
    return Path(absolute_path(path))


@contextlib.contextmanager
def locked(directory: epath.PathLike, refusal: str) -> Iterator[None]:
    """Keeps a second process out of the same directory; the lock ends with the process.

    Object stores have no locks: there, users have to run one process at a time.

    Raises:
        UserError: with the text `refusal`, if another process is there.
    """
    if is_remote(directory):
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(refusal) from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: AnyPath) -> Iterator[AnyPath]:
    """Yields a temporary path whose file gets the name `path` at the end, unless there is an error.

    The name ends in `.tmp`, for whoever cleans up after processes that were killed. For an object
    store it is a local one: an upload appears whole or not at all, and renaming takes a dozen
    requests.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as scratch:
            local = type(path)(scratch) / path.name
            yield local
            files, name = store_of(path)
            files.put_file(os.fspath(local), name)
        return
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # as of a full disk
            with contextlib.suppress(AttributeError):  # errors of PyAV have no setter
                error.filename = os.fspath(path)
        raise


def write_bytes(path: Path | epath.Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
