"""The SQLite file of an index: its settings, its projections, and its media with their features.

Each change is one transaction, so that after a kill the index is as it was before the change or as
it was to be. Readers see the state in which they began to read (WAL).
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import secrets
import shlex
import sqlite3
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from avcl_jax.data.media import MediaError
from avcl_jax.fingerprint.details import AUDIO_HZ, IMAGE_BYTES, VIDEO_HZ, Details
from avcl_jax.fingerprint.projection import Projection
from avcl_jax.fingerprint.segments import SegmentFeatures
from avcl_jax.fingerprint.settings import FingerprintError

DATABASE, FORMAT_VERSION = "index.sqlite", 3
_FORMER_MANIFEST = "manifest.json"  # of format 1
# Transactions last milliseconds: a longer wait means that a writer hangs.
_WAIT_SECONDS = 30.0
_MAX_BYTES = 1_000_000_000  # of one value in SQLite
_SCHEMA = (
    "CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE projections (modality TEXT PRIMARY KEY, arrays BLOB NOT NULL)",
    # AUTOINCREMENT: an id is never given twice, so that it stands for one content.
    "CREATE TABLE media (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, "
    "content TEXT NOT NULL, duration_seconds REAL NOT NULL, path TEXT, segments INTEGER NOT NULL, "
    "checksum INTEGER NOT NULL, arrays BLOB NOT NULL, images BLOB NOT NULL, signs BLOB NOT NULL)",
    f"PRAGMA user_version = {FORMAT_VERSION}",
)
_DAMAGED = "the file is damaged: index the media again"
_NO_ACCESS = "it cannot be opened or written: check the permissions of the file and its folder"
_NO_LOCKS = "its disk fails, or does not lock files: keep the index on a local disk"
_REASONS = {
    sqlite3.SQLITE_BUSY: "another process is changing it: wait until that process has ended",
    sqlite3.SQLITE_FULL: "the disk is full: free some space",
    **dict.fromkeys((sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB), _DAMAGED),
    **dict.fromkeys(
        (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM), _NO_ACCESS
    ),
    **dict.fromkeys((sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PROTOCOL), _NO_LOCKS),
}
_PRESENT = "_present"
_NOT_EMPTY = "{} is not empty: `add` to the index there, or give a new directory"


class SourceRow(NamedTuple):
    """An indexed source: a file, or media added from memory."""

    name: str  # unique in the index
    content: str  # SHA-256 of the file, or of the arrays in memory
    duration_seconds: float
    path: str | None  # of the file; None for media from memory
    segments: int = 0
    id: int = 0  # given by the database, ascending


class Transaction:
    """An open index, as it is in one transaction.

    Reading raises a FingerprintError where the file is damaged.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection):
        """Takes an open connection; see `transaction`."""
        self._path = path
        self._execute = connection.execute
        self._many = connection.executemany

    def settings(self) -> dict[str, Any]:
        """Reads the settings, and `generation`, a random name that each change replaces."""
        with self._intact():
            return {k: json.loads(v) for k, v in self._execute("SELECT key, value FROM settings")}

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Replaces some settings."""
        rows = [(key, json.dumps(value)) for key, value in settings.items()]
        self._many("INSERT OR REPLACE INTO settings VALUES (?, ?)", rows)

    def projections(self) -> dict[str, Projection]:
        """Reads the projection of each modality; none before they were fitted."""
        rows = self._execute("SELECT modality, arrays FROM projections").fetchall()
        with self._intact():
            return {modality: Projection.from_arrays(_unpack(blob)) for modality, blob in rows}

    def write_projections(self, projections: Mapping[str, Projection]) -> None:
        """Replaces the projections."""
        rows = [(modality, _pack(p._asdict())) for modality, p in projections.items()]
        self._many("INSERT OR REPLACE INTO projections VALUES (?, ?)", rows)

    def media(self) -> list[SourceRow]:
        """Reads the descriptions of all media, by id."""
        rows = self._execute(f"SELECT {', '.join(SourceRow._fields)} FROM media ORDER BY id")
        return [SourceRow(*row) for row in rows]

    def content_of(self, name: str) -> str | None:
        """Reads the SHA-256 of the source of this name; None if there is none."""
        row = self._execute("SELECT content FROM media WHERE name = ?", (name,)).fetchone()
        return row and row[0]

    def features_of(self, source: SourceRow) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Reads the segments of a source.

        Returns:
            By modality, float16 [present segments, D] and bool [segments], which are present.
        """
        query = "SELECT checksum, arrays, images, signs FROM media WHERE id = ?"
        ((checksum, blob, *details),) = self._execute(query, (source.id,))
        with self._intact(f" ({source.name})"):
            arrays = _unpack(blob)
            features = {m: a for m, a in arrays.items() if not m.endswith(_PRESENT)}
            present = {m: arrays[m + _PRESENT] for m in features}
            if checksum != _checksum(source, blob, *details):
                raise FingerprintError("the checksum is that of other values")
            return features, present

    def details_of(self, source: SourceRow, begin: float, end: float) -> tuple[Details, float]:
        """Reads the details of an interval of a source, as far as it has them.

        Returns:
            Details, none if the source was removed, and the second at which they begin.
        """
        first = max(0, math.floor(begin))
        count = max(0, math.ceil(end) - first)
        sizes = (VIDEO_HZ * IMAGE_BYTES, AUDIO_HZ * 4)
        slices = [number for size in sizes for number in (first * size + 1, count * size)]
        query = "SELECT substr(images, ?, ?), substr(signs, ?, ?) FROM media WHERE id = ?"
        images, signs = self._execute(query, (*slices, source.id)).fetchone() or (b"", b"")
        with self._intact(f" ({source.name})"):
            video = np.frombuffer(images, np.uint8).reshape(-1, IMAGE_BYTES)
            return Details(video, np.frombuffer(signs, "<u4")), float(first)

    def insert(self, source: SourceRow, segments: SegmentFeatures) -> bool:
        """Adds a source, in place of one of the same name; returns whether there was one.

        Raises:
            MediaError: if its features do not fit into one value.
        """
        arrays = {m + _PRESENT: here for m, here in segments.present.items()}
        for modality, features in segments.features.items():
            arrays[modality] = features[segments.present[modality]].astype(np.float16)
        blob = _pack(arrays)
        if len(blob) > _MAX_BYTES:
            raise MediaError(
                "too_large",
                f"the features take {len(blob) >> 20} MB, at most {_MAX_BYTES >> 20} MB are "
                "stored: cut it into shorter files",
            )
        replaces = self.delete(source.name)
        source = source._replace(
            segments=len(segments), duration_seconds=float(source.duration_seconds)
        )
        details = segments.details
        blobs = blob, details.video.tobytes(), details.audio.astype("<u4").tobytes()
        columns = ", ".join([*SourceRow._fields[:-1], "checksum", "arrays", "images", "signs"])
        self._execute(
            f"INSERT INTO media ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*source[:-1], _checksum(source, *blobs), *blobs),
        )
        return replaces

    def delete(self, name: str) -> bool:
        """Removes a source; returns whether there was one of this name."""
        return self._execute("DELETE FROM media WHERE name = ?", (name,)).rowcount > 0

    def problems(self) -> list[str]:
        """Checks the file, and every value with a checksum; returns one line per problem."""
        lines = [line for (line,) in self._execute("PRAGMA integrity_check") if line != "ok"]
        if lines:
            return [f"{self._path} is damaged: {line}" for line in lines]
        problems = []
        checks: list[Callable[[], object]] = [self.settings, self.projections]
        checks += [functools.partial(self.features_of, source) for source in self.media()]
        for check in checks:
            try:
                check()
            except FingerprintError as error:
                problems.append(str(error))
        return problems

    @contextlib.contextmanager
    def _intact(self, where: str = "") -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise FingerprintError(f"{self._path}{where}: {_DAMAGED}") from error


@contextlib.contextmanager
def transaction(directory: Path, *, write: bool = False) -> Iterator[Transaction]:
    """Opens an index for one transaction, which an exception rolls back.

    Raises:
        FingerprintError: if there is no index, or it cannot be read or written.
    """
    path = directory / DATABASE
    if not path.exists():
        if (directory / _FORMER_MANIFEST).exists():
            raise FingerprintError(
                f"{directory} has the format of a former version: index the media again"
            )
        raise _none_in(directory)
    with _connected(path) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if not version:  # a process was killed when it began to make one
            raise _none_in(directory)
        if version != FORMAT_VERSION:
            raise FingerprintError(
                f"{path} has format {version}, this version reads {FORMAT_VERSION}: index the "
                "media again"
            )
        connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        opened = Transaction(path, connection)
        yield opened
        if write:
            opened.write_settings({"generation": secrets.token_hex(8)})
        connection.execute("COMMIT")


def _none_in(directory: Path) -> FingerprintError:
    return FingerprintError(
        f"there is no fingerprint index in {directory}: make one with "
        f"`avcl-fingerprint index VIDEOS --index {shlex.quote(str(directory))}`"
    )


def check_empty(directory: Path) -> None:
    """Checks that a directory has nothing, or an index that a killed process began to make.

    Raises:
        FingerprintError: if it has something else.
    """
    path = directory / DATABASE
    unfinished = {f"{DATABASE}{suffix}" for suffix in ("", "-journal", "-shm", "-wal")}
    if any(inside.name not in unfinished for inside in directory.iterdir()):
        raise FingerprintError(_NOT_EMPTY.format(directory))
    if path.exists():
        with _connected(path) as connection:
            _check_unfinished(connection, directory)


def _check_unfinished(connection: sqlite3.Connection, directory: Path) -> None:
    if connection.execute("PRAGMA user_version").fetchone() != (0,):
        raise FingerprintError(_NOT_EMPTY.format(directory))


def create(directory: Path, settings: Mapping[str, Any]) -> None:
    """Makes an empty index in an existing directory.

    Raises:
        FingerprintError: if there is one, or the file cannot be written.
    """
    path = directory / DATABASE
    with _connected(path, new=True) as connection:
        connection.execute("PRAGMA auto_vacuum = FULL")  # a removed source takes no space
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        _check_unfinished(connection, directory)  # another process may have made one meanwhile
        for statement in _SCHEMA:
            connection.execute(statement)
        generation = {"generation": secrets.token_hex(8)}
        Transaction(path, connection).write_settings({**settings, **generation})
        connection.execute("COMMIT")


@contextlib.contextmanager
def _connected(path: Path, *, new: bool = False) -> Iterator[sqlite3.Connection]:
    """Opens a connection; errors of SQLite name the file and the way out."""
    try:
        with contextlib.closing(_connect(path, "rwc") if new else _open(path)) as connection:
            yield connection
    except sqlite3.DatabaseError as error:
        reason = _REASONS.get(_code(error))
        if reason is None:
            raise
        raise FingerprintError(f"{path}: {error}; {reason}") from error


def _open(path: Path) -> sqlite3.Connection:
    connection = _connect(path, "rw")
    try:
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        wal = path.with_name(path.name + "-wal")
        # Only a folder that can be written takes the files that WAL needs beside the database.
        # Without changes that wait in one, the database can be read as it is.
        if _code(error) not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) or wal.exists():
            raise
        return _connect(path, "ro&immutable=1")
    return connection


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    address = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(address, timeout=_WAIT_SECONDS, isolation_level=None, uri=True)


def _code(error: sqlite3.Error) -> int:
    # Errors of the module itself have none. Without the details of an extended code.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _pack(arrays: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _unpack(blob: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(blob)) as arrays:
        return dict(arrays)


def _checksum(source: SourceRow, *blobs: bytes) -> int:
    described = repr((source.segments, *source[:4])).encode()
    return functools.reduce(lambda crc, blob: zlib.crc32(blob, crc), (described, *blobs), 0)
