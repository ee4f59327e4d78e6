"""An index on disk: what is added, replaced and removed; other processes; damage and full disks."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from avcl_jax.fingerprint import database, library
from avcl_jax.fingerprint.benchmark.timeline import excerpt
from avcl_jax.fingerprint.calibration import DEFAULTS
from avcl_jax.fingerprint.database import SourceRow, transaction
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.library import Vectors, verify
from avcl_jax.fingerprint.projection import fit_projection
from avcl_jax.fingerprint.settings import FingerprintError
from tests.conftest import ROOT
from tests.fingerprint.synthetic import SETTINGS, clip, write


@pytest.fixture
def copy(library, tmp_path):
    """Directory of an index that may be changed."""
    return shutil.copytree(library.directory, tmp_path / "copy")


def test_added_again_is_skipped_and_changed_content_replaced(copy):
    index = FingerprintIndex.open(copy)
    count = len(index.sources())
    report = index.add([("clip 3", clip(3)), ("clip 4", clip(44)), ("clip 77", clip(77))])
    assert (report.skipped, report.replaced, report.added) == (["clip 3"], ["clip 4"], ["clip 77"])
    reopened = FingerprintIndex.open(copy)
    assert len(reopened.sources()) == count + 1
    assert reopened.query(excerpt(clip(44), 1, 4)).best.source == "clip 4"
    assert reopened.query(excerpt(clip(4), 1, 4)).best is None
    assert verify(copy) == []
    # Of two media of one name the last stays.
    index.add([("clip 77", clip(50)), ("clip 77", clip(51))])
    assert len(index.sources()) == count + 1
    assert index.query(excerpt(clip(51), 1, 4)).best.source == "clip 77"
    assert index.query(excerpt(clip(50), 1, 4)).best is None
    (cache,) = copy.glob("cache-*")
    written = cache.stat().st_ino
    assert index.add([("clip 3", clip(3))]).skipped == ["clip 3"]
    assert [path.stat().st_ino for path in copy.glob("cache-*")] == [written]


def test_a_former_format_is_not_damage(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format_version": 1}')
    with pytest.raises(FingerprintError, match="format of a former version: index the media again"):
        FingerprintIndex.open(tmp_path)


def test_an_index_that_was_killed_in_the_making_is_none(encoders, tmp_path):
    (tmp_path / "index.sqlite").touch()
    with pytest.raises(
        FingerprintError, match=r"^there is no fingerprint index in .*make one with"
    ):
        FingerprintIndex.open(tmp_path)
    index = FingerprintIndex.create(tmp_path, encoders, SETTINGS)
    index.add([("clip", clip(0))])
    for make in (
        lambda: FingerprintIndex.create(tmp_path, encoders, SETTINGS),
        lambda: database.create(tmp_path, {}),  # as by a process that began at the same time
    ):
        with pytest.raises(FingerprintError, match="is not empty: `add` to the index there"):
            make()
    assert [source.name for source in FingerprintIndex.open(tmp_path).sources()] == ["clip"]


def test_removed_is_not_found_and_the_rest_is(copy):
    index = FingerprintIndex.open(copy)
    with pytest.raises(FingerprintError, match="clip 99 is not in"):
        index.remove(["clip 1", "clip 99"])
    assert len(index.sources()) == 16
    index.remove(["clip 1"])
    assert index.query(excerpt(clip(1), 1, 4)).best is None
    assert index.query(excerpt(clip(2), 1, 4)).best.source == "clip 2"
    assert verify(copy) == []
    index.remove([f"clip {n}" for n in range(2, 16)])
    assert [source.name for source in index.sources()] == ["clip 0"]
    # Scores are fitted to an index of this size.
    assert index._library.stored["calibration"]["segments"] == index.num_segments
    assert index.query(excerpt(clip(0), 1, 4)).matches[0].source == "clip 0"
    index.remove(["clip 0"])
    shutil.rmtree(next(copy.glob("cache-*")))
    for emptied in (index, FingerprintIndex.open(copy)):
        assert emptied.query(clip(0)).matches == []


def test_one_by_one_becomes_the_same_as_all_at_once(encoders, tmp_path, library):
    index = FingerprintIndex.create(tmp_path / "index", encoders, SETTINGS)
    for n in range(16):
        index.add([(f"clip {n}", clip(n))])
    for n in (0, 9, 15):
        query = excerpt(clip(n), 1, 4)
        one, all_at_once = index.query(query).best, library.query(query).best
        assert one.source == all_at_once.source
        assert one.offset_seconds == pytest.approx(all_at_once.offset_seconds, abs=0.2)


def test_two_processes_add_at_once_and_readers_see_what_is_there(copy):
    other = FingerprintIndex.open(copy)
    reports = []

    def items():
        yield "first", clip(20)
        reader = FingerprintIndex.open(copy)
        assert reader.query(excerpt(clip(20), 1, 4)).best.source == "first"
        reports.append(other.add([("first", clip(20)), ("second", clip(21))]))
        other.remove(["clip 0"])
        yield "second", clip(21)
        yield "third", clip(22)

    report = FingerprintIndex.open(copy).add(items())
    assert (report.added, report.skipped) == (["first", "third"], ["second"])
    assert (reports[0].added, reports[0].skipped) == (["second"], ["first"])
    index = FingerprintIndex.open(copy)
    assert len(index.sources()) == 18
    for name, n in (("first", 20), ("second", 21), ("third", 22)):
        assert index.query(excerpt(clip(n), 1, 4)).best.source == name
    assert verify(copy) == []


def test_killed_at_any_moment_the_index_is_whole(tmp_path):
    writer = [sys.executable, "-m", "tests.fingerprint.killed_writer", str(tmp_path / "index")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(writer, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_writer_that_holds_the_index_is_waited_for_and_reading_is_free(copy, monkeypatch):
    monkeypatch.setattr(database, "_WAIT_SECONDS", 0.05)
    index = FingerprintIndex.open(copy)
    with contextlib.suppress(ZeroDivisionError), transaction(copy, write=True) as stored:
        stored.delete("clip 0")
        assert len(FingerprintIndex.open(copy).sources()) == 16
        with pytest.raises(FingerprintError, match=r"index\.sqlite: .*wait until that process has"):
            index.remove(["clip 1"])
        raise ZeroDivisionError
    index.remove(["clip 1"])
    assert [s.name for s in FingerprintIndex.open(copy).sources()][:2] == ["clip 0", "clip 2"]


def test_a_full_disk_leaves_the_index_as_it_was(copy, monkeypatch):
    connect = database._connect

    def full(*arguments):
        connection = connect(*arguments)
        connection.execute("PRAGMA max_page_count = 1")  # as many as there are
        return connection

    index = FingerprintIndex.open(copy)
    monkeypatch.setattr(database, "_connect", full)
    with pytest.raises(FingerprintError, match=r"index\.sqlite: .*full.*free some space"):
        index.add([("new", clip(50))])
    monkeypatch.undo()
    assert len(FingerprintIndex.open(copy).sources()) == 16
    assert verify(copy) == []


def test_a_medium_with_too_many_features_is_listed_and_the_rest_added(copy, monkeypatch):
    monkeypatch.setattr(database, "_MAX_BYTES", 9000)
    index = FingerprintIndex.open(copy)
    report = index.add([("clip 1", clip(1, 60.0)), ("short", clip(50, 2.0))])
    ((name, reason),) = report.failed
    assert (name, report.added, report.replaced) == ("clip 1", ["short"], [])
    assert reason.startswith("too_large: the features take 0 MB, at most 0 MB are stored: cut it")
    assert index.query(excerpt(clip(1), 1, 4)).best.source == "clip 1"  # as before


@pytest.mark.parametrize("cached", [True, False])
def test_an_index_that_cannot_be_written_is_read(copy, cached):
    with tempfile.TemporaryDirectory() as parent, contextlib.ExitStack() as stack:
        os.chmod(parent, 0o755)
        directory = shutil.copytree(copy, Path(parent) / "index")
        if not cached:
            shutil.rmtree(next(directory.glob("cache-*")))
        stack.callback(os.chmod, directory, 0o755)
        (directory / "index.sqlite").chmod(0o444)
        directory.chmod(0o555)
        if os.geteuid() == 0:  # to whom everything is allowed
            os.seteuid(65534)
            stack.callback(os.seteuid, 0)
        index = FingerprintIndex.open(directory)
        assert len(index.sources()) == 16
        assert verify(directory) == []
        with pytest.raises(FingerprintError, match="check the permissions"):
            index.remove(["clip 0"])
        assert len(list(directory.iterdir())) == 1 + cached


def test_a_reader_keeps_what_it_opened_and_other_encoders_are_refused(copy, other_encoders):
    reader, other = FingerprintIndex.open(copy), FingerprintIndex.open(copy, other_encoders)
    with pytest.raises(FingerprintError, match=r"was made with encoders [0-9a-f]{12} "):
        other.query(clip(0))
    FingerprintIndex.open(copy).remove([f"clip {n}" for n in range(1, 16)])
    assert reader.query(excerpt(clip(5), 1, 4)).best.source == "clip 5"
    assert len(other.sources()) == 16


@pytest.mark.parametrize("damage", ["cut", "missing", "garbage", "empty"])
def test_a_damaged_database_is_named(copy, damage):
    path = copy / "index.sqlite"
    half = path.stat().st_size // 2
    if damage == "missing":
        path.unlink()
    else:
        contents = {"cut": path.read_bytes()[:half], "garbage": b"garbage" * 1000, "empty": b""}
        path.write_bytes(contents[damage])
    with pytest.raises(FingerprintError, match=r"no fingerprint index|index the media again") as e:
        FingerprintIndex.open(copy)
    assert str(copy) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("damage", ["cut", "missing", "garbage", "whole directory"])
@pytest.mark.parametrize("name", ["video.npy", "audio.npz"])
def test_a_damaged_cache_is_computed_again(copy, library, name, damage):
    path = next(copy.glob("cache-*")) / name
    content = path.read_bytes()
    if damage == "whole directory":
        shutil.rmtree(path.parent)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"garbage" * 100)
    index = FingerprintIndex.open(copy)
    query = excerpt(clip(5), 1, 4)
    assert index.query(query) == library.query(query)
    assert verify(copy) == []
    index.remove(["clip 0"])
    assert next(copy.glob("cache-*/video.npy")).stat().st_size > 0.8 * len(content)


@pytest.mark.parametrize("column", ["arrays", "images", "signs", "path"])
def test_one_wrong_byte_is_found_by_verify(copy, column):
    with contextlib.closing(sqlite3.connect(copy / "index.sqlite")) as connection, connection:
        ((blob,),) = connection.execute(f"SELECT {column} FROM media WHERE name = 'clip 3'")
        value = blob[:-99] + bytes([blob[-99] ^ 1]) + blob[-98:] if blob else "x"
        connection.execute(f"UPDATE media SET {column} = ? WHERE name = 'clip 3'", (value,))
    (problem,) = verify(copy)
    assert problem.startswith(f"{copy / 'index.sqlite'} (clip 3): the file is damaged")
    shutil.rmtree(next(copy.glob("cache-*")))
    with pytest.raises(FingerprintError, match=r"\(clip 3\): the file is damaged"):
        FingerprintIndex.open(copy)


def test_a_cache_of_other_vectors_is_found_by_verify(copy):
    path = next(copy.glob("cache-*/audio.npy"))
    vectors = np.load(path)
    vectors[7, 3] += 0.1
    np.save(path, vectors)
    assert verify(copy) == [f"{path.parent} does not agree with index.sqlite: delete it"]


def test_only_caches_are_deleted_from_the_directory(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "cache-of-my-films").mkdir()
    (copy / "cache-0123456789abcdef").mkdir()
    (copy / "cache-0123456789abcdef.killed").mkdir()
    FingerprintIndex.open(copy).remove(["clip 0"])
    left = sorted(path.name for path in copy.iterdir())
    assert left.pop(0).startswith("cache-")
    assert left == ["cache-of-my-films", "index.sqlite", "notes.txt"]


def blobs(count: int, seed: int) -> np.ndarray:
    centres = np.random.default_rng(0).normal(size=(40, 32))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(40, size=count)] + 0.3 * rng.normal(size=(count, 32))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_compressed_cells_find_what_flat_finds_and_follow_changes():
    values = blobs(4000, 1)
    labels = (np.arange(4000) // 100 + 1 << 32) + np.arange(4000) % 100
    vectors = Vectors(fit_projection(values, 32), labels, values)

    def found(of: Vectors, exclude: int | None = None) -> np.ndarray:
        ids = np.unique(of.labels >> 32)
        queries = values[50:3950] + 0.01 * np.random.default_rng(0).normal(size=(3900, 32))
        sources = [SourceRow("", "", 0.0, None, 100, id_) for id_ in ids.tolist()]
        of_all = library.Library({}, sources, {"video": of})
        _, source, segment = of_all.search("video", queries, 10, exclude)
        return np.where(source < 0, -1, (ids[source] << 32) + segment)

    cells = vectors.with_cells("ivfpq", vectors)
    assert cells.learned_from == 4000
    assert not any(vectors.with_cells(kind, vectors).cells for kind in ("flat", "auto"))
    np.testing.assert_array_equal(found(vectors)[:, 0], labels[50:3950])
    assert np.mean((found(cells) == labels[50:3950, None]).any(axis=1)) > 0.9
    for of in (vectors, cells):
        assert not (found(of, exclude=7) >> 32 == 8).any()
    # Without the first thousand, with a thousand others: the same cells.
    changed = Vectors(
        vectors.projection,
        np.concatenate([labels[1000:], labels[:1000] + (40 << 32)]),
        np.concatenate([values[1000:], blobs(1000, 2)]),
    )
    updated = changed.with_cells("ivfpq", cells)
    assert (updated.learned_from, updated.cells.ntotal, cells.cells.ntotal) == (4000, 4000, 4000)
    assert set(np.unique(found(updated) >> 32)) == set(range(11, 51))
    few = Vectors(vectors.projection, labels[:1500], values[:1500])
    assert few.with_cells("ivfpq", cells).learned_from == 1500


def test_the_projection_whitens_what_it_was_fitted_to():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 6)) * [9, 5, 3, 2, 1, 1]
    features = rng.normal(size=(20_000, 6)) @ mixing.T + 40
    projection = fit_projection(features, 4)
    vectors = (features - projection.mean) @ projection.matrix
    covariance = np.cov(vectors, rowvar=False)
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=0.02)
    assert np.diag(covariance).min() > 0.5
    np.testing.assert_allclose(np.linalg.norm(projection(features), axis=1), 1, rtol=1e-5)
    assert np.isfinite(fit_projection(features[:1], 4)(features)).all()


def test_an_index_of_audio_alone_takes_its_first_film(encoders, tmp_path):
    index = FingerprintIndex.create(tmp_path / "index", encoders, SETTINGS)
    index.add((f"song {n}", clip(n, video=False)) for n in range(3))
    assert np.isfinite(index._library.vectors["video"].projection.matrix).all()
    index.add([("film", clip(9))])
    assert index._library.vectors["video"].projection.fitted_to > 0
    assert index.query(excerpt(clip(9), 1, 4)).matches[0].source == "film"
    # Fitted to more sources only.
    assert index.calibration(("video", "audio")) == DEFAULTS["audio+video"]


@pytest.mark.slow
def test_memory_is_flat_over_five_hundred_files(encoders, tmp_path):
    content = write(tmp_path / "clip.mkv", clip(0, 3.0)).read_bytes()
    resident = []

    def files():
        for n in range(500):
            path = tmp_path / f"{n}.mkv"
            path.write_bytes(content)
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
            yield path

    index = FingerprintIndex.create(tmp_path / "index", encoders, SETTINGS)
    assert len(index.add_files(files()).added) == 500
    assert resident[-1] < 1.05 * resident[50]
