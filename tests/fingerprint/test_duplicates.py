"""`avcl-fingerprint duplicates`: words, JSON and page, and what cannot be used."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from avcl_jax.fingerprint.benchmark.timeline import excerpt
from avcl_jax.fingerprint.command import main
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.settings import FingerprintSettings
from tests.fingerprint.synthetic import RATE_HZ, clip, write
from tests.fingerprint.test_details import speech


def film(seed: int, seconds: float = 8.0):
    return dataclasses.replace(clip(seed, seconds), waveform=speech(seed, seconds))


@pytest.fixture(scope="module")
def library(tmp_path_factory, encoders):
    """An index, and its folder with a film, its copy, a part of it, and others."""
    folder = tmp_path_factory.mktemp("films")
    write(folder / "<film> & 'co'.mp4", film(0, 14))
    shutil.copy(folder / "<film> & 'co'.mp4", folder / "same.mp4")
    write(folder / "part.mkv", excerpt(film(0, 14), 3, 10))
    for n in range(1, 6):
        write(folder / f"{n}.mp4", film(n))
    index = tmp_path_factory.mktemp("made") / "index"
    assert main(["index", str(folder), "--index", str(index), "--encoder", str(encoders)]) == 0
    return index, folder


@pytest.fixture
def run(capsys):
    """Function that runs the command and returns its status, output and errors."""

    def run(index, *options):
        capsys.readouterr()
        status = main(["duplicates", "--index", str(index), *map(str, options)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_copies_and_parts_are_named(library, run, tmp_path):
    index, folder = library
    before = sorted(path.name for path in folder.iterdir())
    written = tmp_path / "out.json"
    page = tmp_path / "out.html"
    status, out, _ = run(index, "--json", written, "--report", page)
    assert status == 0
    original, same, part = (str(folder / n) for n in ("<film> & 'co'.mp4", "same.mp4", "part.mkv"))
    first, *group = out.splitlines()[:3]
    assert first == "copies of each other, 2:"
    assert group == [f"  {original}", f"  {same}"]
    assert f"{part} is contained in {original}" in out
    assert re.search(
        r"^  0\.\d to [67]\.\d s = [23]\.\d to [19]\d?\.\d s: video and audio$", out, re.M
    )
    answer = json.loads(written.read_text())
    assert (answer["index"], answer["min_seconds"]) == (str(index), 3.0)
    assert answer["groups"] == [[original, same]]
    relations = {(p["first"], p["second"]): p["relation"] for p in answer["pairs"]}
    assert relations == {
        (original, same): "same file",
        (part, original): "contained",
        (part, same): "contained",
    }
    contained = next(p for p in answer["pairs"] if p["second"] == original)
    assert contained["matched"] == ["video", "audio"]
    (interval,) = contained["intervals"]
    assert interval["second_start"] == pytest.approx(3, abs=0.5)
    assert interval["second_end"] == pytest.approx(10, abs=0.5)
    html = page.read_text()
    assert "&lt;film&gt; &amp; &#x27;co&#x27;.mp4" in html
    assert "<film>" not in html
    assert html.count("data:image/jpeg;base64,") >= 12
    assert html.count("data:image/png;base64,") >= 4
    assert f">{folder}<" in html
    assert "%3Cfilm%3E" in html  # its address
    assert not re.search(r"(src|href)=\"http", html)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_files_that_are_gone_are_still_listed(encoders, run, tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    write(folder / "a.mp4", film(0))
    shutil.copy(folder / "a.mp4", folder / "b.mp4")
    index = tmp_path / "index"
    main(["index", str(folder), "--index", str(index), "--encoder", str(encoders)])
    (folder / "b.mp4").unlink()
    page = tmp_path / "page.html"
    status, out, _ = run(index, "--report", page)
    assert (status, out.splitlines()[2]) == (0, f"  {folder / 'b.mp4'}")
    assert "the file is no longer there" in page.read_text()


def test_a_link_is_not_a_copy(encoders, run, tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    write(folder / "b.mp4", film(0))
    shutil.copy(folder / "b.mp4", folder / "copy.mp4")
    (folder / "a.mp4").symlink_to("b.mp4")
    (folder / "hard.mp4").hardlink_to(folder / "b.mp4")
    index, written = tmp_path / "index", tmp_path / "out.json"
    main(["index", str(folder), "--index", str(index), "--encoder", str(encoders)])
    _, out, _ = run(index, "--json", written)
    a, b, copy, hard = (str(folder / f"{name}.mp4") for name in ("a", "b", "copy", "hard"))
    assert out.splitlines() == [
        f"{a} is a link to {b}, not a copy",
        f"{hard} is a link to {b}, not a copy",
        "copies of each other, 2:",
        f"  {b}",
        f"  {copy}",
        "groups of copies: 1 (redundant files: 1); contained in others: 0; pairs with a common "
        "part: 0; parts shared by 4 or more: 0",
    ]
    answer = json.loads(written.read_text())
    assert answer["links"] == [{"name": a, "file": b}, {"name": hard, "file": b}]
    assert [(pair["first"], pair["second"]) for pair in answer["pairs"]] == [(b, copy)]


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_a_file_that_cannot_be_written_is_refused_first(library, run, tmp_path, option):
    index, _ = library
    status, out, err = run(index, option, tmp_path / "none" / "file")
    assert (status, out) == (2, "")
    assert err.startswith(f"avcl-fingerprint: {option} {tmp_path / 'none' / 'file'} is in a folder")
    status, _, err = run(index, option, tmp_path)
    assert f"{option} {tmp_path} is a folder" in err


def test_short_parts_are_refused(library, run):
    for seconds in ("1", "nan"):
        status, _, err = run(library[0], "--min-seconds", seconds)
        assert status == 2
        assert "must be at least 2 and finite: shorter parts are alike by chance" in err


def test_an_empty_index_and_one_of_one_source(encoders, run, tmp_path):
    made = FingerprintIndex.create(tmp_path, encoders, FingerprintSettings())
    status, _, err = run(tmp_path)
    assert (status, err) == (2, f"avcl-fingerprint: {tmp_path} is empty: `add` media to it\n")
    made.add([("one", clip(0))])
    status, out, _ = run(tmp_path)
    assert status == 0
    assert out.startswith("no copies and no common parts")


def test_moved_encoders_are_given(library, other_encoders, run):
    status, _, err = run(library[0], "--encoder", other_encoders)
    assert status == 2
    assert "was made with encoders" in err


def test_what_is_removed_meanwhile_is_left_out(encoders, tmp_path):
    index = FingerprintIndex.create(tmp_path, encoders, FingerprintSettings())
    index.add([("a", film(0)), ("b", film(0)), ("c", film(1))])
    opened = FingerprintIndex.open(tmp_path)
    index.remove(["b"])
    index.add([("d", film(0))])
    shared = opened.shared()
    assert {source.name for group in shared.groups for source in group} <= {"a", "b"}
    (group,) = index.shared().groups
    assert [source.name for source in group] == ["a", "d"]


def test_an_interrupt_leaves_nothing_behind(library, monkeypatch, run, tmp_path):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("avcl_jax.fingerprint.sharing.agree", interrupted)
    status, out, err = run(library[0], "--json", tmp_path / "out.json")
    assert (status, out, err.splitlines()[-1]) == (130, "", "avcl-fingerprint: interrupted")
    assert not list(tmp_path.iterdir())


def test_silent_still_media_added_from_memory_have_no_frames_to_show(encoders, tmp_path):
    from avcl_jax.fingerprint.duplicates_page import report

    index = FingerprintIndex.create(tmp_path, encoders, FingerprintSettings())
    quiet = dataclasses.replace(film(0), waveform=np.zeros(8 * RATE_HZ, np.int16))
    index.add([("a", quiet), ("b", quiet)])
    assert "added from memory" in report(index.shared(), index.size, 3.0)
