"""`avcl-fingerprint` from files to answers, and what it says of what it cannot use."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from avcl_jax.data.media import MediaError
from avcl_jax.fingerprint.benchmark.timeline import excerpt
from avcl_jax.fingerprint.command import _COMMANDS, main
from avcl_jax.fingerprint.index import file_sha256
from tests.data.synthetic_media import write_stretches
from tests.fingerprint.synthetic import clip, leader, write


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder with films, sound alone, a text that calls itself a film, and notes."""
    folder = tmp_path_factory.mktemp("films")
    (folder / "inner").mkdir()
    for n in range(3):
        write(folder / f"{n}.mp4", clip(n))
    write(folder / "inner" / "sound.wav", clip(3, video=False))
    (folder / "broken.mp4").write_text("no film at all")
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture(scope="module")
def index(films, encoders, tmp_path_factory):
    directory = tmp_path_factory.mktemp("made") / "index"
    assert main(["index", str(films), "--index", str(directory), "--encoder", str(encoders)]) == 1
    return directory


@pytest.fixture
def run(capsys):
    """Function that runs a command and returns its status, output and errors."""

    def run(*arguments):
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def ask(run, index):
    """Function that returns the answer to a query in JSON."""

    def ask(clip_path, *options, index=index):
        status, out, _ = run("query", clip_path, "--index", index, "--json", *options)
        assert status == 0
        return json.loads(out)

    return ask


def test_what_cannot_be_decoded_is_listed_and_the_rest_indexed(films, index, run):
    status, out, err = run("add", films, "--index", index)
    assert status == 1
    assert err.splitlines() == [
        f"{films / 'broken.mp4'}: not indexed, not_media: FFmpeg finds no container it knows"
    ]
    assert "added 0, replaced 0, already there 4, not indexed 1" in out


def test_a_clip_is_found_in_words_and_in_json(films, index, tmp_path, run, ask):
    query = write(tmp_path / "query.mp4", excerpt(clip(1), 1.5, 5))
    answer = ask(query)
    assert answer["match"] == str(films / "1.mp4")
    first = answer["matches"][0]
    assert first["offset_seconds"] == pytest.approx(1.5, abs=0.2)
    assert first["accepted"]
    by = first["score_by"]
    assert list(by) == ["embeddings", "details", "video_details", "audio_details"]
    assert first["score"] == max(by["embeddings"], by["details"]) >= answer["threshold"]
    assert first["intervals"][0]["query_start"] < 1
    _, words, _ = run("query", query, "--index", index)
    assert words.startswith(f"{films / '1.mp4'} from 1.")
    assert "s of the clip: " in words.splitlines()[1]
    part = ask(films / "2.mp4", "--start", 2.25, "--max-seconds", 2.5)
    assert part["match"] == str(films / "2.mp4")
    assert part["matches"][0]["offset_seconds"] == pytest.approx(2.25, abs=0.2)
    assert part["query_seconds"] == pytest.approx(2.5, abs=0.1)
    # Audio is found by a film and alone.
    audio = ask(write(tmp_path / "query.wav", excerpt(clip(3, video=False), 0.5, 6)))
    assert audio["match"] == str(films / "inner" / "sound.wav")
    assert audio["matches"][0]["video_score"] is None
    unknown = write(tmp_path / "unknown.mp4", clip(60, 3.0))
    status, words, _ = run("query", unknown, "--index", index)
    assert status == 0
    assert words.startswith("no match; nearest, not accepted: ")


def test_clips_without_an_answer_are_named_and_the_others_answered(films, index, tmp_path, run):
    folder = tmp_path / "some clips"
    folder.mkdir()
    (folder / "1 broken.mp4").write_text("no film at all")
    short = write(folder / "2 short.mp4", clip(0, 0.25))
    found = write(folder / "3 found.mp4", excerpt(clip(1), 0.5, 6))
    mute = write(tmp_path / "mute.mp4", clip(2, audio=False))
    reasons = {
        folder / "1 broken.mp4": "not_media: FFmpeg finds no container it knows",
        short: "the query lasts 0.26 s, a segment 0.47 s: give a longer clip",
        mute: "the query has no audio, which is required",
    }
    every = ("query", folder, mute, "--index", index, "--require", "audio")
    status, words, err = run(*every)
    assert status == 1
    said = [f"avcl-fingerprint: {path}: {reason}" for path, reason in reasons.items()]
    assert err.splitlines() == said
    first, match, interval, *_ = words.splitlines()
    assert first == f"{found}:"
    assert match.startswith(f"  {films / '1.mp4'} from 0.")
    assert "s of the clip: " in interval
    status, out, err = run(*every, "--json")
    assert (status, err.splitlines()) == (1, said)
    answers = {answer["query"]: answer for answer in map(json.loads, out.splitlines())}
    assert list(answers) == [str(path) for path in (*list(reasons)[:2], found, mute)]
    assert answers[str(found)]["match"] == str(films / "1.mp4")
    for path, reason in reasons.items():
        assert answers[str(path)] == {"query": str(path), "error": reason}


def test_an_indexed_file_itself_is_the_same_file(films, index, run, ask):
    for part, offset in (((), 0.0), (("--start", "2.25"), 2.25)):
        answer = ask(films / "1.mp4", *part)
        assert (answer["verdict"], answer["match"]) == ("same file", str(films / "1.mp4"))
        first = answer["matches"][0]
        assert (first["same_file"], first["offset_seconds"], first["rate"]) == (True, offset, 1.0)
    _, words, _ = run("query", films / "1.mp4", "--index", index)
    assert ": the same file (" in words.splitlines()[0]


def test_what_is_dubbed_silent_or_black_is_said(films, index, encoders, tmp_path, run, ask):
    dubbed = dataclasses.replace(clip(1), frames=clip(60).frames)
    query = write(tmp_path / "dubbed.mp4", dubbed)
    _, words, _ = run("query", query, "--index", index)
    assert words.startswith(str(films / "1.mp4"))
    assert ": only the audio matches (" in words.splitlines()[0]
    _, words, _ = run("query", query, "--index", index, "--require", "both")
    assert words.startswith("no match; nearest, not accepted: ")
    film = excerpt(clip(1), 1, 5)
    silent = dataclasses.replace(film, waveform=np.zeros_like(film.waveform))
    query = write(tmp_path / "silent.mp4", silent)
    _, words, _ = run("query", query, "--index", index)
    first, second, *_ = words.splitlines()
    assert first == "the audio is silent: only the video was compared"
    assert second.startswith(str(films / "1.mp4"))
    assert ask(query)["empty"] == ["audio"]
    black = write(tmp_path / "black.mkv", leader(3))
    _, words, _ = run("query", black, "--index", index)
    assert re.match(r"no match: 3\.0\d s show one colour and are silent", words)
    new = ("--index", tmp_path / "made", "--encoder", encoders)
    status, _, err = run("index", black, *new)
    assert status == 1
    assert re.search(r"not indexed, 3\.0\d s show one colour and are silent", err)


def test_two_copies_of_a_film_are_both_named(films, encoders, tmp_path, run, ask):
    copy = tmp_path / "copy of 0.mp4"
    copy.write_bytes((films / "0.mp4").read_bytes())
    made = tmp_path / "made"
    run("index", films, copy, "--index", made, "--encoder", encoders)
    both = [str(films / "0.mp4"), str(copy)]
    query = write(tmp_path / "query.mp4", excerpt(clip(0), 1, 5))
    _, words, _ = run("query", query, "--index", made, "--count", 1)
    first, line, *_, more = words.splitlines()
    assert first.startswith("shared by 2 sources, which match equally well: ")
    assert all(name in first for name in both)
    assert line.startswith(tuple(both))
    assert more == "1 more: --count 2"
    for clip_path, verdict in ((query, "shared"), (copy, "same file")):
        answer = ask(clip_path, index=made)
        assert (answer["verdict"], sorted(answer["sources"])) == (verdict, sorted(both))


def test_help_says_what_a_score_means(run, capsys):
    with pytest.raises(SystemExit):
        run("query", "--help")
    words = " ".join(capsys.readouterr().out.split())
    assert "-log10 of the chance that an unrelated clip" in words


def test_remove_verify_and_an_empty_index(films, encoders, tmp_path, run):
    made = tmp_path / "made"
    one = films / "0.mp4"
    assert run("index", one, "--index", made, "--encoder", encoders)[0] == 0
    assert run("verify", "--index", made)[:2] == (
        0,
        f"intact: {made} contains 1 source, 23 segments\n",
    )
    assert run("remove", one, "--index", made)[0] == 0
    status, _, err = run("query", one, "--index", made)
    assert (status, err) == (2, f"avcl-fingerprint: {made} is empty: `add` media to it\n")


def test_errors_are_one_line_that_says_what_to_do(
    films, index, encoders, other_encoders, tmp_path, run
):
    short = write(tmp_path / "short.mp4", clip(0, 0.25))
    text = films / "notes.txt"
    for expected, *arguments in (
        ("there is no fingerprint index in", "query", short, "--index", tmp_path / "none"),
        ("x does not exist", "query", short, tmp_path / "x", "--index", index),
        ("x does not exist", "add", tmp_path / "x", "--index", index),
        ("is not empty", "index", films, "--index", index, "--encoder", encoders),
        ("was made with encoders", "query", short, "--index", index, "--encoder", other_encoders),
        ("there is no directory", "index", films, "--index", tmp_path / "n", "--encoder", "/x"),
        ("is not in", "remove", text, "--index", index),
        (
            *("video is required, but only audio is compared", "query", short, "--index", index),
            *("--require", "video", "--modality", "audio"),
        ),
        ("--count 0 must be at least 1", "query", short, "--index", index, "--count", 0),
        ("--start -1.0 must be", "query", short, "--index", index, "--start=-1"),
        ("--start nan must be", "query", short, "--index", index, "--start", "nan"),
        ("--max-seconds inf must be", "query", short, "--index", index, "--max-seconds", "inf"),
        ("--max-seconds 0.0 must be", "query", short, "--index", index, "--max-seconds", 0),
        *(
            (
                *(f"hop_seconds {hop} must be", "index", films, "--index", tmp_path / "n"),
                *("--encoder", encoders, "--hop-seconds", hop),
            )
            for hop in ("inf", "1e-09")
        ),
        (
            f"index VIDEOS --index '{tmp_path / 'a b'}'`",
            "query",
            short,
            "--index",
            tmp_path / "a b",
        ),
    ):
        status, out, err = run(*arguments)
        assert status == 2, arguments
        assert out == ""
        assert expected in err
        assert err.count("\n") == 1


def test_names_with_dashes_spaces_and_a_tilde_and_videos_of_two_sizes(
    encoders, tmp_path, monkeypatch, run, ask
):
    folder = tmp_path / "my films"
    folder.mkdir()
    write(folder / "-dash.mp4", clip(0))
    write(folder / "a film.mp4", clip(1))
    sizes = folder / "two sizes.ts"
    write_stretches(sizes, [((96, 64), Fraction(1)), ((64, 128), Fraction(1))], seconds=2.0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    made = "~/an index"
    status, out, err = run("index", "~/my films", "--index", made, "--encoder", encoders)
    assert status == 1
    assert out.startswith("added 2, replaced 0, already there 0, not indexed 1;")
    change = r"mixed_sizes: frames change from 96x64 .* to 64x128 .* at 2\.00 s\n"
    there = re.escape(str(sizes))
    assert re.fullmatch(f"{there}: not indexed, {change}", err)
    for name in ("./-dash.mp4", "a film.mp4", "~/my films/a film.mp4"):
        answer = ask(name, index=made)
        named = str(folder / name.rpartition("/")[2])
        assert (answer["verdict"], answer["match"]) == ("same file", named)
        assert answer["query"] == named
    assert run("query", "--index", made, "--", "-dash.mp4")[0] == 0
    status, _, err = run("query", "two sizes.ts", "--index", made)
    assert status == 1
    assert re.fullmatch(f"avcl-fingerprint: {there}: {change}", err)
    for part in (("--max-seconds", 1.5), ("--start", 2.1)):
        status, out, err = run("query", "two sizes.ts", "--index", made, *part)
        assert (status, err) == (0, ""), part
        assert out.startswith("no match; nearest")
    assert run("remove", "--index", made, "--", "-dash.mp4")[0] == 0


def test_names_that_are_not_utf8_and_devices_are_listed(films, encoders, tmp_path, run):
    folder = tmp_path / "media"
    folder.mkdir()
    for name in ("caf\udce9.mp4", "two\nlines.mp4", "copy.mp4"):
        shutil.copy(films / "1.mp4", folder / name)
    made = ("--index", tmp_path / "an \udce9")
    status, _, err = run("index", folder, "/dev/null", *made, "--encoder", encoders)
    assert status == 1
    assert err.splitlines() == [
        f"{folder}/caf\\udce9.mp4: not indexed, its name is not UTF-8: rename it",
        "/dev/null: not indexed, not_media: a pipe or a device, not a recording",
    ]
    status, out, err = run("query", folder / "caf\udce9.mp4", "/dev/null", *made)
    assert status == 1
    assert err == "avcl-fingerprint: /dev/null: not_media: a pipe or a device, not a recording\n"
    assert out.startswith(f"{folder}/caf\\udce9.mp4:\n")
    assert f"{folder}/two\\nlines.mp4 from 0.00 s" in out
    status, out, _ = run("duplicates", *made)
    assert (status, out.splitlines()[2]) == (0, f"  {folder}/two\\nlines.mp4")
    status, _, err = run("remove", folder / "caf\udce9.mp4", *made)
    assert (status, err.count("is not in")) == (2, 1)
    with pytest.raises(MediaError, match="a pipe or a device"):
        file_sha256(Path("/dev/null"))  # a pipe, which nobody writes, has no end


def test_sigterm_ends_a_command_as_an_interrupt(index, run, monkeypatch):
    command = _COMMANDS["verify"]._replace(run=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setitem(_COMMANDS, "verify", command)
    assert run("verify", "--index", index) == (130, "", "avcl-fingerprint: interrupted\n")


def test_a_wrong_command_line_is_refused_in_one_line(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("index", "a", "--index", "b", "--kind", "x")
    error = capsys.readouterr().err
    assert (error.count("\n"), "--kind: invalid choice: 'x'" in error) == (1, True)
