"""Records in an object store: S3's protocol, served by moto (needs requirements-interop.txt)."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from avcl_jax.data.records import RecordDataset, RecordError
from avcl_jax.data_prep import shards
from avcl_jax.data_prep.__main__ import main
from tests.data.synthetic_media import write_clip

pytestmark = pytest.mark.interop
s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (requirements-interop.txt)")
moto = pytest.importorskip("moto.server", reason="moto is not installed (requirements-interop.txt)")


@pytest.fixture(scope="module")
def store() -> Iterator[None]:
    """An S3 service of this process's own."""
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        yield
    server.stop()


@pytest.fixture
def bucket(store: None) -> str:
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    write_clip(folder / "a.mp4", 15)
    for name in ("b.mp4", "c.mp4"):
        shutil.copy(folder / "a.mp4", folder / name)
    (folder / "bad.mp4").write_text("no film")
    return folder


def prepare(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> int:
    return main(["prepare", str(source), f"--out={out}", "--shard-size=2"])


def test_written_and_read_in_a_store_as_on_a_disk(
    folder: Path, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(folder, f"{bucket}/out") == 3
    assert prepare(folder, tmp_path / "local") == 3
    remote, local = (
        RecordDataset(f"{bucket}/out", "train"),
        RecordDataset(tmp_path / "local", "train"),
    )
    assert remote.fingerprint == local.fingerprint
    for number in range(3):
        assert remote[number].frames == local[number].frames
        np.testing.assert_array_equal(remote[number].waveform, local[number].waveform)
    found = s3fs.S3FileSystem().find(f"{bucket}/out")
    assert sorted(os.path.basename(path) for path in found) == sorted(
        path.name for path in (tmp_path / "local").iterdir()
    )
    capsys.readouterr()
    assert prepare(folder, f"{bucket}/out") == 3
    assert "up to date" in capsys.readouterr().out
    (folder / "b.mp4").unlink()
    assert prepare(folder, f"{bucket}/out") == 3
    assert "3 unchanged, 0 changed, 0 new, 1 gone" in capsys.readouterr().out
    assert list(RecordDataset(f"{bucket}/out", "train").record_ids) == ["a.mp4", "c.mp4"]


def test_a_shard_that_is_damaged_in_a_store_is_detected(folder: Path, bucket: str) -> None:
    assert prepare(folder, f"{bucket}/out") == 3
    files = s3fs.S3FileSystem()
    (shard, *_) = [path for path in files.find(f"{bucket}/out") if ".tfrecord-" in path]
    content = bytearray(files.cat(shard))
    content[len(content) // 4] ^= 1  # of the first of two records
    files.pipe(shard, bytes(content))
    dataset = RecordDataset(f"{bucket}/out", "train")
    with pytest.raises(RecordError, match="damaged"):
        [dataset[number] for number in range(3)]


def test_media_and_tables_in_a_store(folder: Path, bucket: str, tmp_path: Path) -> None:
    files = s3fs.S3FileSystem()
    files.put(f"{folder}/", f"{bucket}/media/", recursive=True)
    assert prepare(f"{bucket}/media", tmp_path / "remote") == 3
    assert prepare(folder, tmp_path / "local") == 3
    remote, local = (RecordDataset(tmp_path / name, "train") for name in ("remote", "local"))
    assert remote.fingerprint == local.fingerprint
    files.pipe(f"{bucket}/list.csv", b"path,label_x\nmedia/a.mp4,one\nmedia/gone.mp4,two\n")
    assert prepare(f"{bucket}/list.csv", tmp_path / "table") == 3
    assert list(RecordDataset(tmp_path / "table", "train").record_ids) == ["media/a.mp4"]
    assert '"not_found"' in (tmp_path / "table" / "rejected.jsonl").read_text()


def test_record_files_in_a_store_are_read_in_place(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Path(__file__).parents[1] / "data_prep" / "testdata" / "tiny"
    s3fs.S3FileSystem().put(f"{tiny}/", f"{bucket}/tiny/", recursive=True)

    def refuse(files: object, path: str) -> None:
        raise AssertionError(f"a copy of {path}")

    monkeypatch.setattr(shards.LocalFiles, "local", refuse)
    parts: list[shards.Part] = []
    monkeypatch.setattr(
        "avcl_jax.data_prep.prepare.Pool.run",
        lambda pool, todo: parts.extend(todo) or run_here(todo),
    )
    for out, source in (("remote", f"{bucket}/tiny"), ("local", str(tiny))):
        assert main(["tfds", source, f"--out={tmp_path / out}", "--fps=10"]) == 0
    assert len(parts) == 4
    for split in ("train", "test"):
        remote, local = (RecordDataset(tmp_path / out, split) for out in ("remote", "local"))
        assert remote.fingerprint == local.fingerprint


def run_here(parts: list[shards.Part]) -> None:
    """Prepares parts in this process, where functions can be replaced."""
    for part in parts:
        shards.prepare_part(part, begin=lambda *_: None)
