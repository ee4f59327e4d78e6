"""`avcl-embed` from files to a table: its vectors, what it resumes, and what it refuses."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import scipy.io.wavfile

from avcl_jax import compilation_cache
from avcl_jax.data.encode import write_mp4
from avcl_jax.data.media import decode_media, decode_record, probe
from avcl_jax.data.records import RecordDataset
from avcl_jax.embed import command, cutting, vectors
from avcl_jax.export import load_encoder
from avcl_jax.paths import locked
from tests.data.synthetic_records import make_record, write_records
from tests.embed.conftest import SPAN
from tests.fingerprint.synthetic import FPS, RATE_HZ, clip, write

PARTS = "features.parquet.parts"


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """Leaves the user's compilation cache alone."""
    monkeypatch.setattr(compilation_cache, "keep_compiled", lambda: None)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder with films, one of them silent, audio, a text called like a film, and notes."""
    folder = tmp_path_factory.mktemp("films")
    (folder / "inner").mkdir()
    write(folder / "0.mkv", clip(0, 6.0))
    write(folder / "inner" / "1.mp4", clip(1, 5.3))
    write(folder / "-silent it's.mkv", clip(2, 2.0, audio=False))
    write(folder / "audio.wav", clip(3, 3.0, video=False))
    (folder / "broken.mp4").write_text("no film at all")
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture
def embed(encoders, tmp_path, capsys, monkeypatch):
    """Function that runs the command in an empty folder; returns status, table and errors."""
    monkeypatch.chdir(tmp_path)

    def embed(*arguments, out="features.parquet"):
        capsys.readouterr()
        status = command.main([*map(str, arguments), f"--encoder={encoders}", f"--out={out}"])
        said = capsys.readouterr()
        table = None
        if Path(out).is_file() and out.endswith("parquet"):
            table = pq.read_table(io.BytesIO(Path(out).read_bytes()))
        return status, table, said.err.splitlines()

    return embed


def rows(table, name, modality):
    """Returns starts, ends and vectors of one file and modality."""
    mask = pc.and_(pc.equal(table["id"], name), pc.equal(table["modality"], modality))
    columns = table.filter(mask).to_pydict()
    return tuple(np.array(columns[name]) for name in ("start", "end", "vector"))


def left(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_batch_larger_than_the_memory_is_refused(films, embed):
    status, table, said = embed(films / "audio.wav", "--batch-size=100000000000")
    assert (status, table) == (2, None)
    assert said[-1].startswith("avcl-embed: a batch of 100,000,000,000 takes ")
    assert "GB of memory: choose a smaller batch (--batch-size" in said[-1]


def test_vectors_are_those_of_the_loaded_encoders(films, encoders, embed):
    status, table, errors = embed(films)
    assert status == 1
    assert errors == ["broken.mp4: not_media: FFmpeg finds no container it knows"]
    assert table.column_names == ["id", "start", "end", "speed", "modality", "vector"]
    assert set(table["speed"].to_pylist()) == {1}
    assert list(dict.fromkeys(table["id"].to_pylist())) == [
        "-silent it's.mkv",
        "0.mkv",
        "audio.wav",
        "inner/1.mp4",
    ]
    video, audio = (load_encoder(encoders / name) for name in ("video", "audio"))
    frames = decode_media(
        films / "0.mkv", short_side=16, max_fps=None, sample_rate_hz=RATE_HZ
    ).frames
    starts, ends, found = rows(table, "0.mkv", "video")
    np.testing.assert_allclose(starts, SPAN * np.arange(12))
    np.testing.assert_allclose(ends, starts + SPAN)
    np.testing.assert_allclose(found, video(frames, FPS), atol=1e-5)
    _, waveform = scipy.io.wavfile.read(films / "audio.wav")
    starts, _, found = rows(table, "audio.wav", "audio")
    np.testing.assert_allclose(starts, SPAN * np.arange(6))
    np.testing.assert_allclose(found, audio(waveform, RATE_HZ), atol=1e-5)
    # Rows of video come before those of audio of the same time.
    first = table.slice(4, 2).to_pydict()
    assert (first["id"], first["modality"]) == (["0.mkv"] * 2, ["video", "audio"])
    assert left(".") == ["features.parquet"]


def test_a_file_has_the_modalities_it_has(films, embed):
    _, table, _ = embed(films)
    pairs = set(zip(table["id"].to_pylist(), table["modality"].to_pylist(), strict=True))
    assert ("-silent it's.mkv", "audio") not in pairs
    assert ("audio.wav", "video") not in pairs
    assert {("-silent it's.mkv", "video"), ("inner/1.mp4", "audio")} < pairs
    status, table, errors = embed(films, "--modality=audio")
    assert status == 1
    assert set(table["modality"].to_pylist()) == {"audio"}
    assert errors[0] == "-silent it's.mkv: empty: no audio from 0 s on"


def test_the_last_clip_ends_with_the_file(films, embed):
    _, table, _ = embed(films / "inner")
    starts, ends, _ = rows(table, "1.mp4", "video")
    assert len(starts) == 11
    assert starts[-2:].tolist() == pytest.approx([4.5, 4.8], abs=0.07)
    assert ends[-1] == pytest.approx(5.3, abs=0.07)


def test_speed_and_hop(films, encoders, embed):
    _, table, _ = embed(films / "audio.wav", "--speed=2", "--hop-seconds=0.25")
    starts, ends, found = rows(table, str(films / "audio.wav"), "audio")
    np.testing.assert_allclose(starts, 0.25 * np.arange(9))
    np.testing.assert_allclose(ends, starts + 1.0)
    assert set(table["speed"].to_pylist()) == {2}
    _, waveform = scipy.io.wavfile.read(films / "audio.wav")
    expected = load_encoder(encoders / "audio")(waveform, RATE_HZ, speed=2)
    np.testing.assert_allclose(found[::4], expected, atol=1e-5)


@pytest.mark.parametrize("stated", ["right", None, 1.5, 30.0])
def test_a_long_file_is_cut_piece_by_piece(films, embed, monkeypatch, stated):
    """Whatever its header says about its length."""
    _, whole, _ = embed(films / "0.mkv", out="whole.parquet")
    monkeypatch.setattr(cutting, "_PIECE_SECONDS", 1.0)
    if stated != "right":
        monkeypatch.setattr(
            cutting, "probe", lambda path: probe(path)._replace(duration_seconds=stated)
        )
    status, pieces, _ = embed(films / "0.mkv", "--workers=3")
    assert status == 0
    for name in ("start", "end", "modality"):
        assert pieces[name].to_pylist() == whole[name].to_pylist()
    # The resampler of the audio begins again in each piece.
    for modality, tolerance in (("video", 1e-5), ("audio", 0.05)):
        found, expected = (rows(t, str(films / "0.mkv"), modality)[2] for t in (pieces, whole))
        np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.parametrize("stated", ["right", None])
def test_a_still_screen_does_not_end_a_file(embed, monkeypatch, tmp_path, stated):
    times = [n / 8 for n in range(80) if not 2 < n / 8 < 8]
    frames = np.random.default_rng(0).integers(0, 256, (len(times), 32, 32, 3), np.uint8)
    write_mp4(
        tmp_path / "screen.mkv",
        zip(times, frames, strict=True),
        None,
        fps=8,
        sample_rate_hz=RATE_HZ,
        audio_bits_per_second=64_000,
        video_options={"threads": "1"},
        variable_rate=True,
        container="matroska",
    )
    monkeypatch.setattr(cutting, "_PIECE_SECONDS", 4.0)
    if stated is None:
        monkeypatch.setattr(
            cutting, "probe", lambda path: probe(path)._replace(duration_seconds=None)
        )
    _, table, _ = embed("screen.mkv")
    starts = table["start"].to_pylist()
    assert set(np.arange(0, 4, 0.5)) < set(starts)
    assert set(np.arange(8, 10, 0.5)) < set(starts)


def test_a_file_that_fails_late_has_no_rows(films, embed, monkeypatch, tmp_path):
    monkeypatch.setattr(cutting, "_PIECE_SECONDS", 1.0)
    monkeypatch.setattr(vectors, "_PART_CLIPS", 2)
    content = (films / "0.mkv").read_bytes()
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.mkv").write_bytes(content[: len(content) * 3 // 4])
    shutil.copy(films / "audio.wav", tmp_path / "media" / "b.wav")
    status, table, errors = embed("media")
    assert status == 1
    assert errors[0].startswith("a.mkv: truncated: ")
    assert set(table["id"].to_pylist()) == {"b.wav"}


def test_rows_of_a_table(films, embed, tmp_path):
    lines = [
        "path,start,end,id",
        "0.mkv,1,3,cut",
        "0.mkv,,,whole",
        "absent.mp4,,,gone",
        "0.mkv,9,,late",
    ]
    (tmp_path / "clips.csv").write_text("\n".join(lines))
    status, table, errors = embed("clips.csv", f"--root={films}")
    assert status == 1
    assert errors == [
        f"gone: not_found: {films}/absent.mp4 does not exist",
        "late: outside: no video and no audio from 9 s on",
    ]
    for modality in ("video", "audio"):
        starts, ends, found = rows(table, "cut", modality)
        np.testing.assert_allclose(starts, [1, 1.5, 2, 2.5], atol=0.03)
        np.testing.assert_allclose(ends, starts + SPAN)
        if modality == "video":
            whole = rows(table, "whole", "video")[2]
            np.testing.assert_allclose(found, whole[2:6], atol=1e-5)


def test_records(encoders, embed, tmp_path):
    made = [make_record(0, seconds=2.0), make_record(1, seconds=2.0, has_audio=False)]
    write_records(tmp_path / "records", made)
    status, table, errors = embed("records")
    assert (status, errors) == (0, [])
    assert set(table["id"].to_pylist()) == {"record 0", "record 1"}
    assert not len(rows(table, "record 1", "audio")[0])
    dataset = RecordDataset(tmp_path / "records", "train")
    index = list(dataset.record_ids).index("record 0")
    media = decode_record(dataset[index])
    for modality, arguments in (
        ("video", (media.frames, 16.0)),
        ("audio", (media.waveform, 16_000)),
    ):
        expected = load_encoder(encoders / modality)(*arguments)
        np.testing.assert_allclose(rows(table, "record 0", modality)[2], expected, atol=1e-5)


def test_the_mean_of_a_file(films, embed, monkeypatch):
    _, clips, _ = embed(films, out="clips.parquet")
    monkeypatch.setattr(vectors, "_PART_CLIPS", 3)  # a file lies in several parts
    monkeypatch.setattr(cutting, "_PIECE_SECONDS", 1.0)
    _, table, _ = embed(films, "--per-file")
    assert len(table) == 6
    for name, modality in (("0.mkv", "video"), ("0.mkv", "audio"), ("audio.wav", "audio")):
        starts, ends, found = rows(clips, name, modality)
        start, end, mean = rows(table, name, modality)
        assert (start.tolist(), end.tolist()) == ([starts[0]], [ends[-1]])
        np.testing.assert_allclose(mean[0], found.mean(axis=0), atol=0.02)


def test_arrays_of_each_modality(films, embed):
    _, table, _ = embed(films)
    embed(films, out="features.npz")
    with np.load("features.npz") as arrays:
        assert arrays["video_id"].tolist()[:4] == ["-silent it's.mkv"] * 4
        for modality in ("video", "audio"):
            starts, ends, found = rows(table, "0.mkv", modality)
            mask = arrays[f"{modality}_id"] == "0.mkv"
            np.testing.assert_array_equal(arrays[f"{modality}_vector"][mask], found)
            np.testing.assert_array_equal(arrays[f"{modality}_start"][mask], starts)
            np.testing.assert_array_equal(arrays[f"{modality}_end"][mask], ends)
            assert (arrays[f"{modality}_speed"] == 1).all()


def interrupted(monkeypatch, after):
    """Makes the command end by Ctrl-C after it has stored some parts."""
    original = vectors.Parts.append
    count = 0

    def append(self, *arguments):
        nonlocal count
        original(self, *arguments)
        count += 1
        if count == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(vectors.Parts, "append", append)
    return lambda: monkeypatch.setattr(vectors.Parts, "append", original)


@pytest.mark.parametrize("after", [1, 2, 4, 5])
def test_an_interrupted_command_resumes_and_gives_the_same_file(films, embed, monkeypatch, after):
    monkeypatch.setattr(cutting, "_PIECE_SECONDS", 1.0)
    monkeypatch.setattr(vectors, "_PART_CLIPS", 6)
    _, _, failed = embed(films, out="whole.parquet")
    resume = interrupted(monkeypatch, after)
    status, table, errors = embed(films)
    assert (status, table) == (130, None)
    assert errors == ["avcl-embed: interrupted; run the same command again to resume"]
    stored = {path.name: path.stat().st_mtime_ns for path in Path(PARTS).glob("0*.parquet")}
    assert len(stored) == after
    (Path(PARTS) / "000099.parquet.1.tmp").write_bytes(b"half")  # of a process that was killed
    resume()
    calls = []
    original = vectors.Parts.append
    monkeypatch.setattr(vectors.Parts, "append", lambda *a: (calls.append(1), original(*a)))
    status, _, errors = embed(films)
    assert (status, errors) == (1, failed)
    assert len(calls) == 6 - after or pytest.fail(str(len(calls)))
    assert Path("features.parquet").read_bytes() == Path("whole.parquet").read_bytes()
    assert left(".") == ["features.parquet", "whole.parquet"]


def test_parts_of_another_command_are_not_used(films, embed, monkeypatch):
    monkeypatch.setattr(vectors, "_PART_CLIPS", 6)
    resume = interrupted(monkeypatch, 1)
    assert embed(films)[0] == 130
    resume()
    _, table, _ = embed(films, "--speed=2")
    assert set(table["speed"].to_pylist()) == {2}


def test_only_one_process_writes_a_file(films, embed):
    Path(PARTS).mkdir()
    with locked(Path(PARTS), "unused"):
        status, table, errors = embed(films)
    assert (status, table) == (2, None)
    path = Path("features.parquet").absolute()
    assert errors == [f"avcl-embed: another avcl-embed is writing to {path}: wait for it"]


def test_a_full_disk_is_named(films, embed, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    status, table, errors = embed(films)
    assert (status, table) == (2, None)
    path = Path("features.parquet").absolute()
    assert errors == [
        f"avcl-embed: the disk of {path} is full: free some space, and run the same command again "
        "to resume"
    ]
    assert left(PARTS) == ["job"]


def test_nothing_is_written_if_no_file_can_be_embedded(embed, tmp_path):
    (tmp_path / "a.mp4").write_text("no film")
    status, table, (error,) = embed("a.mp4")
    assert (status, table) == (2, None)
    assert "none of 1 files could be embedded; the first is" in error
    assert left(".") == ["a.mp4"]


def test_names_that_are_not_text(films, embed, tmp_path):
    (tmp_path / "media").mkdir()
    shutil.copy(films / "audio.wav", os.fsencode(tmp_path / "media") + b"/caf\xe9.wav")
    shutil.copy(films / "audio.wav", tmp_path / "media" / "two\nlines.wav")
    (tmp_path / "media" / "not\n\x1bfilm.mp4").write_text("no film")
    status, table, errors = embed("media", out="caf\udce9 #%20.parquet")
    assert status == 1
    assert set(table["id"].to_pylist()) == {"caf\\xe9.wav", "two\nlines.wav"}
    assert [error.partition(":")[0] for error in errors] == ["not\\n\\x1bfilm.mp4"]


def test_files_of_the_user_among_the_parts_are_not_removed(films, embed):
    (Path(PARTS) / "inner").mkdir(parents=True)
    (Path(PARTS) / "000001.parquet").write_bytes(b"of another command")
    status, _, (error,) = embed(films)
    assert status == 2
    assert error.endswith("but contains inner: move it, or give another --out")
    assert left(PARTS) == ["000001.parquet", "inner"]


def test_a_damaged_part_is_named(films, embed, monkeypatch):
    monkeypatch.setattr(vectors, "_PART_CLIPS", 6)
    resume = interrupted(monkeypatch, 2)
    assert embed(films)[0] == 130
    resume()
    part = Path(PARTS).absolute() / "000001.parquet"
    part.write_bytes(b"")
    status, table, (error,) = embed(films)
    assert (status, table) == (2, None)
    assert error.startswith(f"avcl-embed: {part} is damaged (")
    assert error.endswith(f": delete {part.parent} and run again")


def test_two_files_of_one_name_need_other_ids(films, embed, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        shutil.copy(films / "audio.wav", tmp_path / name / "1.wav")
    status, _, (error,) = embed("a", "b")
    assert status == 2
    assert error.startswith("avcl-embed: two clips would have the id '1.wav': of ")
    assert embed("a/1.wav", "b/1.wav")[0] == 0
    assert embed(".")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "out", "message"),
    [
        (["absent"], "f.parquet", "absent does not exist"),
        (["FILMS"], "f.csv", "f.csv must end in .parquet or .npz"),
        (["FILMS"], "folder.npz", "folder.npz is a folder: give the name of a file"),
        (["FILMS"], "remote.csv/a/f.npz", "/remote.csv is a file, not a folder: give another"),
        (["FILMS"], "g.npz", "/g.npz.parts is a file, not a folder: give another name"),
        (["/dev/null"], "f.npz", "not_media: a pipe or a device, not a recording"),
        (["empty"], "f.parquet", "no media files in"),
        (["FILMS", "--encoder=nothing"], "f.parquet", "there is no directory"),
        (["clips.xlsx"], "f.parquet", "is neither media nor a supported table"),
        (["remote.csv"], "f.parquet", "gs://bucket/a.mp4 must be local"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    arguments, out, message, films, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "folder.npz"):
        (tmp_path / name).mkdir()
    for name in ("clips.xlsx", "g.npz.parts"):
        (tmp_path / name).write_bytes(b"PK")
    (tmp_path / "remote.csv").write_text("path\ngs://bucket/a.mp4\n")
    before = left(".")
    given = [str(films) if argument == "FILMS" else argument for argument in arguments]
    assert command.main([*given, "--out", out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("avcl-embed: ")
    assert error.count("\n") == 1
    assert message in error
    assert left(".") == before


@pytest.mark.parametrize(
    "option", ["--speed=0", "--hop-seconds=0.009", "--workers=x", "--modality=text"]
)
def test_wrong_options_are_refused_in_one_line(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["a", "--out=f.npz", option])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert option.partition("=")[0] in error


def test_the_output_says_which_encoder_it_is_of(films, embed, encoders):
    _, table, _ = embed(films / "audio.wav")
    about = json.loads(table.schema.metadata[b"avcl_embed"])
    assert about["encoder"] == str(encoders)
    assert about["hop_seconds"] == SPAN
