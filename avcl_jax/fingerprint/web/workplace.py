"""Where a server keeps files for a while: one directory, gone with the server however it ends.

A server that ends orderly deletes its directory. One that is killed cannot, so the next one does:
a directory whose lock nobody holds has no owner any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX, _LOCK = "avcl-fingerprint-", "owner.lock"


@contextlib.contextmanager
def workplace(parent: Path | None = None) -> Iterator[Path]:
    """Makes a private directory for as long as the block lasts, and deletes abandoned ones.

    Args:
        parent: where; None for the system's place for temporary files (`TMPDIR`).
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    for path in parent.glob(f"{_PREFIX}*"):
        _delete_if_abandoned(path)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    with (directory / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _delete_if_abandoned(path: Path) -> None:
    # Other users have such directories too, and a link with this name may lead anywhere.
    if path.is_symlink() or path.stat(follow_symlinks=False).st_uid != os.getuid():
        return
    try:
        with (path / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
    except (FileNotFoundError, NotADirectoryError, BlockingIOError):
        # Owned, or so new that its owner has not locked it yet.
        return
