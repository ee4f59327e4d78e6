"""`avcl-fingerprint` from files to answers, and what it says of what it cannot use."""

from __future__ import annotations

import dataclasses
import json
import re
from fractions import Fraction

import numpy as np
import pytest

from avcl_jax.fingerprint.command import main
from tests.data.synthetic_media import write_stretches
from tests.fingerprint.synthetic import clip, excerpt, leader, write


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


def run(capsys, *arguments):
    capsys.readouterr()
    status = main([str(a) for a in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_what_cannot_be_decoded_is_listed_and_the_rest_indexed(films, index, capsys):
    status, out, err = run(capsys, "add", films, "--index", index)
    assert status == 1
    assert err.splitlines() == [
        f"{films / 'broken.mp4'}: not indexed, not_media: FFmpeg finds no container it knows"
    ]
    assert "added 0, replaced 0, already there 4, not indexed 1" in out


def test_a_clip_is_found_in_words_and_in_json(films, index, tmp_path, capsys):
    query = write(tmp_path / "query.mp4", excerpt(clip(1), 1.5, 5))
    status, out, _ = run(capsys, "query", query, "--index", index, "--json")
    answer = json.loads(out)
    assert status == 0
    assert answer["match"] == str(films / "1.mp4")
    first = answer["matches"][0]
    assert first["offset_seconds"] == pytest.approx(1.5, abs=0.2)
    assert first["accepted"]
    assert first["score"] >= answer["threshold"]
    assert first["intervals"][0]["query_start"] < 1
    _, words, _ = run(capsys, "query", query, "--index", index)
    assert words.startswith(f"{films / '1.mp4'} from 1.")
    assert "s of the clip: " in words.splitlines()[1]


def test_an_indexed_file_itself_is_the_same_file(films, index, capsys):
    for part, offset in (((), 0.0), (("--start", "2.25"), 2.25)):
        _, out, _ = run(capsys, "query", films / "1.mp4", "--index", index, "--json", *part)
        answer = json.loads(out)
        assert (answer["verdict"], answer["match"]) == ("same file", str(films / "1.mp4"))
        first = answer["matches"][0]
        assert (first["same_file"], first["offset_seconds"], first["rate"]) == (True, offset, 1.0)
    _, words, _ = run(capsys, "query", films / "1.mp4", "--index", index)
    assert ": the same file (" in words.splitlines()[0]


def test_a_dubbed_film_is_no_copy_of_the_film(films, index, tmp_path, capsys):
    dubbed = dataclasses.replace(clip(1), frames=clip(60).frames)
    query = write(tmp_path / "dubbed.mp4", dubbed)
    _, words, _ = run(capsys, "query", query, "--index", index)
    assert words.startswith(str(films / "1.mp4"))
    assert ": only the audio matches (" in words.splitlines()[0]
    _, words, _ = run(capsys, "query", query, "--index", index, "--require", "both")
    assert words.startswith("no match; nearest, not accepted: ")


def test_two_copies_of_a_film_are_both_named(films, index, encoders, tmp_path, capsys):
    copy = tmp_path / "copy of 0.mp4"
    copy.write_bytes((films / "0.mp4").read_bytes())
    made = tmp_path / "made"
    run(capsys, "index", films, copy, "--index", made, "--encoder", encoders)
    both = [str(films / "0.mp4"), str(copy)]
    query = write(tmp_path / "query.mp4", excerpt(clip(0), 1, 5))
    _, words, _ = run(capsys, "query", query, "--index", made, "--count", 1)
    first, line, *_, more = words.splitlines()
    assert first.startswith("shared by 2 sources, which match equally well: ")
    assert all(name in first for name in both)
    assert line.startswith(tuple(both))
    assert more == "1 more: --count 2"
    for clip_path, verdict in ((query, "shared"), (copy, "same file")):
        _, out, _ = run(capsys, "query", clip_path, "--index", made, "--json")
        answer = json.loads(out)
        assert (answer["verdict"], sorted(answer["sources"])) == (verdict, sorted(both))


def test_a_silent_copy_is_said_to_be_silent(films, index, tmp_path, capsys):
    film = excerpt(clip(1), 1, 5)
    query = write(
        tmp_path / "q.mp4", dataclasses.replace(film, waveform=np.zeros_like(film.waveform))
    )
    _, words, _ = run(capsys, "query", query, "--index", index)
    first, second, *_ = words.splitlines()
    assert first == "the audio is silent: only the video was compared"
    assert second.startswith(str(films / "1.mp4"))
    _, out, _ = run(capsys, "query", query, "--index", index, "--json")
    assert json.loads(out)["empty"] == ["audio"]


def test_black_and_silence_are_said(index, encoders, tmp_path, capsys):
    black = write(tmp_path / "black.mkv", leader(3))
    _, out, _ = run(capsys, "query", black, "--index", index)
    assert out.startswith("no match: 3.0")
    assert "show one colour and are silent" in out
    made = tmp_path / "made"
    status, _, err = run(capsys, "index", black, "--index", made, "--encoder", encoders)
    assert status == 1
    assert "not indexed, 3.0" in err
    assert "show one colour and are silent" in err


def test_help_says_what_a_score_means(capsys):
    with pytest.raises(SystemExit):
        run(capsys, "query", "--help")
    assert "-log10 of the chance that an unrelated clip" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_part_of_a_long_clip_is_asked_for(films, index, capsys):
    part = ("--start", "2.25", "--max-seconds", "2.5")
    status, out, _ = run(capsys, "query", films / "2.mp4", "--index", index, "--json", *part)
    answer = json.loads(out)
    assert status == 0
    assert answer["match"] == str(films / "2.mp4")
    assert answer["matches"][0]["offset_seconds"] == pytest.approx(2.25, abs=0.2)
    assert answer["query_seconds"] == pytest.approx(2.5, abs=0.1)


def test_sound_is_found_by_a_film_and_alone(films, index, tmp_path, capsys):
    query = write(tmp_path / "query.wav", excerpt(clip(3, video=False), 1, 5))
    _, out, _ = run(capsys, "query", query, "--index", index, "--json")
    answer = json.loads(out)
    assert answer["match"] == str(films / "inner" / "sound.wav")
    assert answer["matches"][0]["video_score"] is None


def test_an_unknown_clip_is_no_match(index, tmp_path, capsys):
    query = write(tmp_path / "query.mp4", clip(60, 3.0))
    status, out, _ = run(capsys, "query", query, "--index", index)
    assert status == 0
    assert out.startswith("no match; nearest, not accepted: ")


def test_remove_verify_and_an_empty_index(films, encoders, tmp_path, capsys):
    made = tmp_path / "made"
    one = films / "0.mp4"
    assert run(capsys, "index", one, "--index", made, "--encoder", encoders)[0] == 0
    assert run(capsys, "verify", "--index", made)[:2] == (
        0,
        f"intact: {made} contains 1 media, 23 segments\n",
    )
    assert run(capsys, "remove", one, "--index", made)[0] == 0
    status, _, err = run(capsys, "query", one, "--index", made)
    assert (status, err) == (2, f"avcl-fingerprint: {made} is empty: `add` media to it\n")


def test_errors_are_one_line_that_says_what_to_do(films, index, encoders, tmp_path, capsys):
    short = write(tmp_path / "short.mp4", clip(0, 0.25))
    text = films / "notes.txt"
    for expected, *arguments in (
        ("there is no fingerprint index in", "query", short, "--index", tmp_path / "none"),
        ("cannot be decoded: not_media", "query", text, "--index", index),
        ("cannot be decoded: not_found", "query", tmp_path / "x", "--index", index),
        ("give a longer clip", "query", short, "--index", index),
        ("x does not exist", "add", tmp_path / "x", "--index", index),
        ("is not empty", "index", films, "--index", index, "--encoder", encoders),
        ("there is no directory", "index", films, "--index", tmp_path / "n", "--encoder", "/x"),
        ("is not in", "remove", text, "--index", index),
        (
            "the query has no video, which is required",
            "query",
            films / "inner" / "sound.wav",
            "--index",
            index,
            "--require",
            "both",
        ),
        (
            "video is required, but only audio is compared",
            "query",
            short,
            "--index",
            index,
            "--require",
            "video",
            "--modality",
            "audio",
        ),
        ("--count 0 shows nothing", "query", short, "--index", index, "--count", 0),
    ):
        status, out, err = run(capsys, *arguments)
        assert status == 2, arguments
        assert out == ""
        assert expected in err
        assert err.count("\n") == 1


def test_names_with_dashes_spaces_and_a_tilde_and_videos_of_two_sizes(
    encoders, tmp_path, monkeypatch, capsys
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
    status, out, err = run(capsys, "index", "~/my films", "--index", made, "--encoder", encoders)
    assert (status, out.split(";")[0]) == (
        *(1, "added 2, replaced 0, already there 0, not indexed 1"),
    )
    change = r"mixed_sizes: frames change from 96x64 .* to 64x128 .* at 2\.00 s\n"
    there = re.escape(str(sizes))
    assert re.fullmatch(f"{there}: not indexed, {change}", err)
    for name in ("./-dash.mp4", "a film.mp4", "~/my films/a film.mp4"):
        status, out, _ = run(capsys, "query", name, "--index", made, "--json")
        answer = json.loads(out)
        assert (status, answer["verdict"]) == (0, "same file")
        assert answer["match"] == str(folder / name.rpartition("/")[2])
    assert run(capsys, "query", "--index", made, "--", "-dash.mp4")[0] == 0
    status, _, err = run(capsys, "query", "two sizes.ts", "--index", made)
    assert status == 2
    assert re.fullmatch(f"avcl-fingerprint: {there} cannot be decoded: {change}", err)
    for part in (("--max-seconds", 1.5), ("--start", 2.1)):
        status, out, err = run(capsys, "query", "two sizes.ts", "--index", made, *part)
        assert (status, err) == (0, ""), part
        assert out.startswith("no match; nearest")
    assert run(capsys, "remove", "--index", made, "--", "-dash.mp4")[0] == 0
