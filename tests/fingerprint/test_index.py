"""An index on disk: what is added, replaced, removed; who may write; what is damaged or foreign."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from avcl_jax.fingerprint import ann
from avcl_jax.fingerprint.error import FingerprintError
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.projection import fit_projection
from avcl_jax.fingerprint.store import one_writer
from avcl_jax.fingerprint.verification import verify
from tests.conftest import ROOT
from tests.fingerprint.conftest import SETTINGS
from tests.fingerprint.synthetic import clip, excerpt, write


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


def test_of_two_media_of_one_name_the_last_stays(copy):
    index = FingerprintIndex.open(copy)
    index.add([("new", clip(50)), ("new", clip(51))])
    assert [source.name for source in index.sources()].count("new") == 1
    assert index.query(excerpt(clip(51), 1, 4)).best.source == "new"
    assert index.query(excerpt(clip(50), 1, 4)).best is None


def test_scores_are_fitted_anew_when_most_is_removed(copy):
    index = FingerprintIndex.open(copy)
    assert index._manifest["calibration"]["segments"] == index.num_segments
    index.remove([f"clip {n}" for n in range(12)])
    assert index._manifest["calibration"]["segments"] == index.num_segments


def test_what_others_put_beside_the_parts_stays(copy):
    (copy / "part-of-my-films").mkdir()
    (copy / "part-999999").mkdir()
    FingerprintIndex.open(copy).remove(["clip 0"])
    assert (copy / "part-of-my-films").exists()
    assert not (copy / "part-999999").exists()


def test_a_manifest_that_lacks_something_is_damaged(copy):
    (copy / "manifest.json").write_text('{"format_version": 1}')
    with pytest.raises(FingerprintError, match=r"manifest.json is damaged, it lacks settings"):
        FingerprintIndex.open(copy)


def test_faiss_that_is_missing_is_not_damage(copy, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(FingerprintError, match="FAISS is not installed"):
        FingerprintIndex.open(copy)


def test_a_file_that_a_writer_deletes_meanwhile_is_missing_not_damaged(copy, monkeypatch):
    read = ann.read

    def deleted(path):
        path.unlink()
        return read(path)

    monkeypatch.setattr(ann, "read", deleted)
    with pytest.raises(FingerprintError, match=r"\.faiss is missing: index the media again"):
        FingerprintIndex.open(copy)


def test_removed_is_not_found_and_the_rest_is(copy):
    index = FingerprintIndex.open(copy)
    with pytest.raises(FingerprintError, match="clip 99 is not in"):
        index.remove(["clip 1", "clip 99"])
    assert len(index.sources()) == 16
    index.remove(["clip 1"])
    assert index.query(excerpt(clip(1), 1, 4)).best is None
    assert index.query(excerpt(clip(2), 1, 4)).best.source == "clip 2"
    assert verify(copy) == []
    index.remove([f"clip {n}" for n in range(2, 16)])  # most: the part is written anew
    assert [source.name for source in index.sources()] == ["clip 0"]
    assert len(list(copy.glob("part-*"))) == 1
    assert index.query(excerpt(clip(0), 1, 4)).matches[0].source == "clip 0"
    index.remove(["clip 0"])
    assert index.query(clip(0)).matches == []


def test_one_by_one_becomes_the_same_as_all_at_once(encoders, tmp_path, library):
    index = FingerprintIndex.create(tmp_path / "index", encoders, SETTINGS)
    for n in range(16):
        index.add([(f"clip {n}", clip(n))])
    assert len(list(index.directory.glob("part-*"))) <= 5
    for n in (0, 9, 15):
        query = excerpt(clip(n), 1, 4)
        one, all_at_once = index.query(query).best, library.query(query).best
        assert one.source == all_at_once.source
        assert one.offset_seconds == pytest.approx(all_at_once.offset_seconds, abs=0.2)


def test_a_second_writer_is_told_of_the_first(copy):
    script = (
        "import sys; from pathlib import Path; from avcl_jax.fingerprint.store import one_writer\n"
        "with one_writer(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(copy)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        index = FingerprintIndex.open(copy)  # reading is free
        with pytest.raises(FingerprintError, match=f"written by process {holder.pid} "):
            index.remove(["clip 0"])
        holder.kill()
        holder.wait()
    index.remove(["clip 0"])  # the lock of the dead is no lock


def test_a_reader_keeps_what_it_opened_while_it_is_replaced(copy):
    reader = FingerprintIndex.open(copy)
    writer = FingerprintIndex.open(copy)
    writer.remove([f"clip {n}" for n in range(1, 16)])
    assert reader.query(excerpt(clip(5), 1, 4)).best.source == "clip 5"


def test_other_encoders_are_refused(copy, other_encoders):
    index = FingerprintIndex.open(copy, other_encoders)
    with pytest.raises(FingerprintError, match=r"was made with encoders [0-9a-f]{12} "):
        index.query(clip(0))
    assert len(index.sources()) == 16


FILES = ["manifest.json", "sources.parquet", "segments.parquet", "video.npy", "audio.faiss", "npz"]


@pytest.mark.parametrize("damage", ["cut", "missing", "garbage"])
@pytest.mark.parametrize("name", FILES)
def test_each_damaged_file_is_named(copy, name, damage):
    (path,) = [p for p in copy.rglob("*") if p.name.endswith(name)]
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes(b"garbage" * 100)
    no_manifest = name == "manifest.json" and damage == "missing"
    named = str(copy) if no_manifest else path.name if path.parent == copy else path.parent.name
    with pytest.raises(FingerprintError, match=named) as error:
        FingerprintIndex.open(copy)
    assert "\n" not in str(error.value)
    if name != "manifest.json":
        assert any(path.name in problem for problem in verify(copy))


def test_one_wrong_byte_is_found_by_verify(copy):
    (path,) = copy.rglob("video.npy")
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(bytes(content))
    assert verify(copy) == [f"{path} is damaged: its checksum is not the one of the manifest"]


def test_an_index_is_not_made_over_something(copy, encoders):
    with pytest.raises(FingerprintError, match="is not empty"):
        FingerprintIndex.create(copy, encoders, SETTINGS)


def test_nothing_that_others_put_there_is_deleted(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "part-999999").mkdir()
    FingerprintIndex.open(copy).remove(["clip 0"])
    assert (copy / "notes.txt").read_text() == "mine"
    assert not (copy / "part-999999").exists()


def test_compressed_cells_find_what_flat_finds():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 32))
    vectors = centres[rng.integers(40, size=4000)] + 0.3 * rng.normal(size=(4000, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    queries = vectors[:200] + 0.01 * rng.normal(size=(200, 32)).astype(np.float32)
    kept = np.arange(4000) % 5 != 0
    flat, cells = ann.build(vectors, "flat"), ann.build(vectors, "ivfpq")
    for keep in (None, kept):
        best = np.argmax(np.where(True if keep is None else keep, queries @ vectors.T, -9), axis=1)
        np.testing.assert_array_equal(ann.search(flat, queries, 1, keep)[1][:, 0], best)
        found = ann.search(cells, queries, 10, keep)[1]
        assert np.mean((found == best[:, None]).any(axis=1)) > 0.9
        assert keep is None or keep[found[found >= 0]].all()


def test_the_projection_whitens_what_it_was_fitted_to():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 6)) * np.array([9, 5, 3, 2, 1, 1])
    features = rng.normal(size=(20_000, 6)) @ mixing.T + 40
    projection = fit_projection(features, 4)
    vectors = (features - projection.mean) @ projection.matrix
    covariance = np.cov(vectors, rowvar=False)
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=0.02)
    assert np.diag(covariance).min() > 0.5
    np.testing.assert_allclose(np.linalg.norm(projection(features), axis=1), 1, rtol=1e-5)
    assert np.isfinite(fit_projection(features[:1], 4)(features)).all()


def test_the_lock_is_free_after_an_error(copy):
    with pytest.raises(ZeroDivisionError), one_writer(copy):
        raise ZeroDivisionError
    with one_writer(copy):
        assert (copy / "writer.lock").read_text()


def test_an_index_of_audio_alone_takes_its_first_film(encoders, tmp_path):
    index = FingerprintIndex.create(tmp_path / "index", encoders, SETTINGS)
    index.add((f"song {n}", clip(n, video=False)) for n in range(3))
    assert np.isfinite(index._snapshot.projections["video"].matrix).all()
    index.add([("film", clip(9))])
    assert index._snapshot.projections["video"].fitted_to > 0
    assert index.query(excerpt(clip(9), 1, 4)).matches[0].source == "film"


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
