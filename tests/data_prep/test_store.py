"""Preparation from and to an object store: which requests it sends, and what it notices."""

from __future__ import annotations

import asyncio
import io
import json
import wave
from collections import Counter
from collections.abc import Iterator

import fsspec
import gcsfs.core
import numpy as np
import pytest

from avcl_jax.data.records import RecordDataset
from avcl_jax.data_prep import shards
from avcl_jax.data_prep.source_files import states_of
from benchmarks import object_store
from tests.data_prep.conftest import listed, prepare

FILES = 40  # more than the number from which a folder is listed


def audio(number: int, seconds: float = 0.1) -> bytes:
    """A recording; those of one length have as many bytes."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        rng = np.random.default_rng(number)
        file.writeframes(rng.integers(-9000, 9000, int(16000 * seconds)).astype("<i2").tobytes())
    return content.getvalue()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[object_store.Store]:
    """A store with media; parts are prepared in this process."""

    def prepare_here(pool: object, parts: list[shards.Part]) -> None:
        for part in parts:
            gcsfs.core.GCSFileSystem.clear_instance_cache()  # a worker has no cached listing
            shards.prepare_part(part, begin=lambda *_: None)

    monkeypatch.setattr("avcl_jax.data_prep.prepare.Pool.run", prepare_here)
    with object_store.running() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        for protocol in ("gs", "gcs"):
            monkeypatch.setitem(fsspec.config.conf, protocol, {"token": "anon"})
            fsspec.register_implementation(protocol, gcsfs.core.GCSFileSystem, clobber=True)
        gcsfs.core.GCSFileSystem.clear_instance_cache()
        for number in range(FILES):
            store.put(f"bucket/media/{number:02d}.wav", audio(number))
        yield store


def of_media(store: object_store.Store) -> Counter[object_store.Request]:
    """Counts the requests for media, and forgets all."""
    requests = [request for request in store.requests if "/media/" in request.name]
    store.requests.clear()
    return Counter(requests)


def run(source: str, out: object, *more: str) -> int:
    return prepare(source, out, "--shard-size=20", *more)  # type: ignore[arg-type] # an address


def test_each_file_is_listed_and_downloaded_once(store, tmp_path, capsys):
    media, out = "gs://bucket/media", "gs://bucket/records"
    assert run(media, out) == 0
    requests = of_media(store)
    downloads = [request for request in requests if request.kind == "download"]
    assert len(downloads) == FILES
    assert {requests[request] for request in downloads} == {1}
    # To find the files, for their states, and for these again when all are prepared.
    assert {request.kind for request in requests} == {"download", "list"}
    assert sum(requests.values()) - FILES <= 5
    assert run(media, tmp_path / "local") == 0
    assert RecordDataset(out, "train").fingerprint == (
        RecordDataset(tmp_path / "local", "train").fingerprint
    )
    # The same again, then with a file of as many bytes, which was written in the same second.
    store.requests.clear()
    assert run(media, out) == 0
    assert "up to date" in capsys.readouterr().out
    assert {request.kind for request in of_media(store)} == {"list"}
    written = store.written["bucket/media/03.wav"]
    store.put("bucket/media/03.wav", audio(1000))
    store.written["bucket/media/03.wav"] = str(int(written) + 1)
    assert run(media, out) == 0
    assert "39 unchanged, 1 changed, 0 new" in capsys.readouterr().out
    downloads = [request for request in of_media(store) if request.kind == "download"]
    assert [request.name for request in downloads] == ["bucket/media/03.wav"]


@pytest.mark.slow
def test_a_part_takes_few_requests_to_the_output(store):
    of_parts = []
    for size in (40, 4):  # in one part, in ten
        assert run("gs://bucket/media", f"gs://bucket/{size}", f"--shard-size={size}") == 0
        of_parts.append(sum("/media" not in request.name for request in store.requests))
        store.requests.clear()
    # Three uploads, a copy, three deletions, and eleven others to read what was written.
    # Of two that are sent at one time, the second is cancelled if it is not needed.
    assert of_parts[1] - of_parts[0] <= 9 * 20, of_parts


@pytest.mark.slow
def test_a_content_is_read_where_a_store_has_written_it_anew(store, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("gs://bucket/media", out) == 0
    for number in range(FILES):
        store.put(f"bucket/media/{number:02d}.wav", audio(number + (number == 3)))
    of_media(store)
    assert run("gs://bucket/media", out) == 0
    assert "39 unchanged, 1 changed, 0 new" in capsys.readouterr().out
    requests = of_media(store)
    assert sum(number for request, number in requests.items() if request.kind == "download") == 41


def test_files_of_a_table_are_asked_for_many_at_one_time(store, tmp_path):
    table, out = tmp_path / "clips.csv", tmp_path / "out"
    rows = [f"gs://bucket/media/{number:02d}.wav" for number in range(20)]
    table.write_text("\n".join(["path", *rows, "gs://bucket/media/none.wav"]))
    store.awaited = 21
    assert set(map(bool, states_of([*rows, "gs://bucket/media/none.wav"]).values())) == {
        True,
        False,
    }
    assert not store.awaited, "no answer was sent before all of them had been asked for"
    of_media(store)
    assert run(str(table), out) == 3
    requests = of_media(store)
    downloads = Counter({r.name: n for r, n in requests.items() if r.kind == "download"})
    assert downloads == Counter(
        row.removeprefix("gs://") for row in [*rows, rows[0][:-6] + "none.wav"]
    )
    # Two each for their states, before and after; four for the one that is not there.
    assert sum(requests.values()) - 21 == 2 * 20 + 4
    (line,) = listed(out)
    assert line["reason"] == "not_found"


def test_a_file_is_copied_once_for_all_its_clips(store, tmp_path):
    table, out = tmp_path / "clips.csv", tmp_path / "out"
    rows = [f"gs://bucket/media/00.wav,{n / 50},{n / 50 + 0.02}" for n in range(4)]
    table.write_text("\n".join(["path,start,end", *rows]))
    assert run(str(table), out) == 0
    assert of_media(store)[object_store.Request("download", "bucket/media/00.wav")] == 1
    lines = [json.loads(line) for line in (out / "sources.jsonl").open()]
    assert len({line["sha256"] for line in lines}) == 1
    assert len(RecordDataset(out, "train")) == 4


def test_duplicates_need_no_other_download(store, tmp_path):
    store.put("bucket/media/copy.wav", store.content["bucket/media/07.wav"])
    assert run("gs://bucket/media", tmp_path / "out") == 0
    assert max(n for r, n in of_media(store).items() if r.kind == "download") == 1
    (line,) = listed(tmp_path / "out", "duplicates")
    assert (line["id"], line["duplicate_of"]) == ("copy.wav", "07.wav")


def test_a_file_that_changes_while_it_is_prepared_is_told(store, tmp_path, capsys, monkeypatch):
    prepare_clip = shards.prepare_clip

    def change(*arguments):
        store.put("bucket/media/09.wav", audio(len(store.requests)))
        return prepare_clip(*arguments)

    monkeypatch.setattr(shards, "prepare_clip", change)
    assert run("gs://bucket/media", tmp_path / "out") == 1
    assert "or a file of it changed: run again" in capsys.readouterr().err


@pytest.mark.slow
def test_a_store_that_fails_is_tried_again_and_then_told(store, tmp_path, capsys, monkeypatch):
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(0))
    store.failing.add("bucket/media/05.wav")
    out = tmp_path / "out"
    assert run("gs://bucket/media", out) == 3
    assert of_media(store)[object_store.Request("download", "bucket/media/05.wav")] == 6
    (line,) = listed(out)
    assert (line["reason"], line["message"]) == (
        "unreadable",
        "gs://bucket/media/05.wav: try again, 503",
    )
    store.failing.clear()
    assert run("gs://bucket/media", out) == 0  # tried again
    assert "39 unchanged, 1 changed" in capsys.readouterr().out
    store.failing.add("bucket/media")
    store.failing.add("bucket/list.csv")
    assert run("gs://bucket/list.csv", tmp_path / "other") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the object store failed: try again, 503")
    assert said.count("\n") == 1


def test_what_an_interrupted_run_has_finished_is_kept(store, monkeypatch, capsys):
    prepare_part = shards.prepare_part

    def interrupt(part, begin):
        if part.number:
            raise KeyboardInterrupt
        prepare_part(part, begin)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "prepare_part", interrupt)
        assert run("gs://bucket/media", "gs://bucket/records") == 130
    of_media(store)
    assert run("gs://bucket/media", "gs://bucket/records") == 0
    assert sum(n for request, n in of_media(store).items() if request.kind == "download") == 20
    assert len(RecordDataset("gs://bucket/records", "train")) == FILES
