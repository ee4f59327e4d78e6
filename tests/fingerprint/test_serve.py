"""The page's server as a process: what it answers, refuses, serves, and leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import tempfile

import av
import numpy as np
import pytest
import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import Request

from avcl_jax.fingerprint.command import main
from avcl_jax.fingerprint.database import transaction
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.settings import THRESHOLD
from avcl_jax.fingerprint.web import requests
from tests.fingerprint.page_server import running
from tests.fingerprint.synthetic import SETTINGS, clip


# The server of this module searches `page_library`: a test that changes it changes it back.
@pytest.fixture(scope="module")
def server(page_library, tmp_path_factory):
    options = ("--max-upload-mb=2", "--max-waiting=1", "--max-seconds=8")
    temporary = tmp_path_factory.mktemp("page_tmp") / "tmp"
    with running(page_library.directory, temporary, *options) as process:
        yield process
    assert process.process.returncode == 0
    assert not [line for line in process.messages if "Traceback" in line], process.messages
    assert not list(temporary.iterdir())


def test_a_clip_finds_its_source_and_its_place_by_stages_that_are_told(server, clips):
    film = clips / "film.mp4"
    stream = {"Accept": "application/x-ndjson"}
    status, headers, body = server.request("/api/query?name=film.mp4", film.read_bytes(), stream)
    assert (status, headers["content-type"]) == (200, "application/x-ndjson")
    waiting, *stages, last = (json.loads(line) for line in body.splitlines())
    assert waiting == {"stage": "waiting", "before": 0}
    assert stages == [{"stage": "decoding"}, {"stage": "comparing"}]
    answer = last["answer"]
    match = answer["match"]
    assert match["title"] == "film <b>.mp4"
    assert match["offset_seconds"] == pytest.approx(3.0, abs=0.15)
    assert match["rate"] == pytest.approx(1.0, abs=0.03)
    assert match["score"] >= answer["threshold"] == THRESHOLD
    assert match["accepted"]
    assert answer["candidates"][0] == match
    scores = [candidate["score"] for candidate in answer["candidates"]]
    assert scores == sorted(scores, reverse=True)
    segments = match["segments"]
    assert segments[0]["query_start"] < 0.3
    assert segments[-1]["query_end"] > 3.7
    for modality in ("video", "audio"):
        assert np.mean([segment[modality] > 2 for segment in segments]) > 0.7
    assert answer["clip"]["converted_url"] is None
    assert not server.uploads()
    status, answer = server.ask(clips / "foreign.mp4")
    assert (status, answer["match"]) == (200, None)
    assert answer["candidates"]
    assert not any(candidate["accepted"] for candidate in answer["candidates"])


def test_what_has_to_match_is_chosen_and_what_is_silent_is_said(server, clips):
    _, answer = server.ask(clips / "dubbed.mkv")
    assert (answer["required"], answer["sources"]) == ([], [answer["match"]["source"]])
    assert answer["match"]["what_matched"] == "only the audio matches"
    for option, found in (("audio", True), ("video", False), ("both", False)):
        status, answer = server.ask(clips / "dubbed.mkv", options=f"&require={option}")
        assert status == 200
        assert (answer["verdict"] == "match", bool(answer["sources"])) == (found, found)
    assert answer["required"] == ["video", "audio"]
    _, answer = server.ask(clips / "silent.mkv")
    assert (answer["verdict"], answer["clip"]["empty"]) == ("match", ["audio"])
    assert answer["clip"]["remark"] == "the audio is silent: only the video was compared"
    _, answer = server.ask(clips / "trailer.mkv")
    assert (answer["verdict"], len(answer["sources"])) == ("shared", 2)
    for name, option, status, said in (
        ("sound.wav", "video", 422, "sound.wav: the query has no video, which is required"),
        ("film.mp4", "taste", 400, "require is video, audio, both or left out, not taste"),
    ):
        found, answer = server.ask(clips / name, options=f"&require={option}")
        assert (found, answer) == (status, {"error": said})


def test_what_browsers_do_not_play_is_converted_and_audio_drawn(server, clips, tmp_path):
    _, answer = server.ask(clips / "old.mkv")
    media = answer["match"]["media"]
    assert answer["match"]["title"] == "old film.mkv"
    assert media["url"] is None
    assert media["converted_start_seconds"] == pytest.approx(3.0, abs=0.2)
    for address in (answer["clip"]["converted_url"], media["converted_url"]):
        status, headers, body = server.request(address)
        assert (status, headers["content-type"]) == (200, "video/mp4")
        (tmp_path / "played.mp4").write_bytes(body)
        with av.open(str(tmp_path / "played.mp4")) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
            assert container.streams.audio[0].codec_context.name == "aac"
            assert container.duration / 1e6 == pytest.approx(
                4.0 if "clips" in address else 11.0, abs=0.3
            )

    # Audio alone has a spectrogram.
    _, answer = server.ask(clips / "sound.wav")
    assert answer["match"]["title"] == "sound.wav"
    status, _, body = server.request(answer["match"]["media"]["spectrogram_url"])
    assert status == 200
    for sound in (answer["clip"]["spectrogram"], json.loads(body)):
        assert sound["columns"] > 100
        assert sound["rows"] == 64
    assert answer["clip"]["spectrogram"]["seconds"] == pytest.approx(4.5, abs=0.01)


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("notes.mp4", 422, r"notes\.mp4 cannot be compared: not a video.*Give another file"),
        ("cut.mkv", 422, r"cut\.mkv cannot be compared.*Give another file"),
        ("short.mkv", 422, r"short\.mkv lasts 0\..*found 0\..*give a longer one"),
        ("empty.mp4", 400, r"empty\.mp4 is empty, 0 bytes.*choose another file"),
    ],
)
def test_what_cannot_be_compared_is_named_and_the_server_goes_on(server, clips, name, status, said):
    found, answer = server.ask(clips / name)
    assert (found, list(answer)) == (status, ["error"])
    assert re.fullmatch(said, answer["error"])
    assert str(server.temporary) not in answer["error"]
    assert not server.uploads()
    assert server.ask(clips / "film.mp4")[1]["match"]["title"] == "film <b>.mp4"


def test_a_clip_that_makes_the_decoder_crash_is_refused_and_the_next_compared(server, clips):
    film = clips / "film.mp4"
    server.ask(film)  # so that the processes run
    decoders = server.media_processes()
    assert decoders
    for decoder in decoders:
        os.kill(decoder, signal.SIGSTOP)
    with holding_a_place(server, film) as (connection, body):
        connection.send(body)
        answer = connection.getresponse()
        assert [json.loads(answer.readline())["stage"] for _ in range(2)] == ["waiting", "decoding"]
        (upload,) = server.temporary.rglob("clip-*")
        upload.unlink()
        os.mkfifo(upload)
        for decoder in decoders:
            os.kill(decoder, signal.SIGCONT)
        # Returns when a decoder has opened the other end, from which it then reads for ever.
        pipe = os.open(upload, os.O_WRONLY)
        for decoder in decoders:
            os.kill(decoder, signal.SIGSEGV)
        last = json.loads(answer.readline())
        os.close(pipe)
    said = "film.mp4 cannot be compared: it made the decoder crash. Give another file"
    assert last == {"error": said, "status": 422}
    assert not server.uploads()
    assert server.ask(film)[1]["match"]["title"] == "film <b>.mp4"
    assert not set(decoders) & set(server.media_processes())


def test_the_name_of_a_clip_is_shown_and_nothing_else(server, clips):
    _, answer = server.ask(clips / "foreign.mp4", "../../etc/pass\nwd<script>.mp4")
    assert answer["clip"]["name"] == "passwd<script>.mp4"
    _, answer = server.ask(clips / "notes.mp4", "C:\\films\\" + "x" * 400)
    assert answer["error"].startswith("x" * 200 + " ")


def test_a_body_past_the_limit_is_refused_by_its_header_or_where_it_passes_it(server):
    with contextlib.closing(server.connect()) as connection:
        connection.putrequest("POST", "/api/query?name=film.mp4")
        connection.putheader("Content-Length", str(2 << 30))
        connection.endheaders()  # and not one byte of the body
        answer = connection.getresponse()
        assert answer.status == 413
        assert b"the clip has 2048 MB, at most 2 MB are taken: cut it, or" in answer.read()
    assert not server.uploads()
    sent, block = 0, b"x" * 65536
    with contextlib.closing(server.connect()) as connection:
        connection.putrequest("POST", "/api/query?name=film.mp4")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        # A socket takes more than has been read: what is counted is what the server lets in.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < (1 << 30):
                connection.send(b"10000\r\n" + block + b"\r\n")
                sent += len(block)
    assert sent < 64 << 20
    server.wait_until_no_upload_is_left()


@contextlib.contextmanager
def holding_a_place(server, path):
    """A request that has been let in, as "100 Continue" tells, and whose body is yet to come."""
    body = path.read_bytes()
    with contextlib.closing(server.connect()) as connection:
        connection.putrequest("POST", f"/api/query?name={path.name}")
        connection.putheader("Content-Length", str(len(body)))
        connection.putheader("Accept", "application/x-ndjson")
        connection.putheader("Expect", "100-continue")
        connection.endheaders()
        assert connection.sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        yield connection, body


def test_the_line_has_an_end(server, clips):
    film = clips / "film.mp4"
    with holding_a_place(server, film) as first, holding_a_place(server, film) as second:
        status, answer = server.ask(film)
        assert status == 503
        assert "no clip is taken while 2 are compared or wait" in answer["error"]
        for before, (connection, body) in enumerate((first, second)):
            connection.send(body)
            answer = connection.getresponse()
            lines = [json.loads(line) for line in answer.read().splitlines()]
            assert lines[0] == {"stage": "waiting", "before": before}
            assert lines[-1]["answer"]["match"]["title"] == "film <b>.mp4"
    assert server.ask(film)[0] == 200


def test_an_upload_that_breaks_off_and_a_page_that_is_closed_leave_nothing(server, clips):
    film = clips / "film.mp4"
    with holding_a_place(server, film) as (connection, _):
        connection.send(b"\0" * 1000)
        assert server.uploads()
        connection.close()
        server.wait_until_no_upload_is_left()
    for _ in range(3):  # more than may wait
        with holding_a_place(server, film) as (connection, body):
            connection.send(body)
            assert json.loads(connection.getresponse().readline())["stage"] == "waiting"
        server.wait_until_no_upload_is_left()
    assert server.ask(film)[1]["match"]["title"] == "film <b>.mp4"


def test_sources_are_served_by_id_with_ranges(server, clips, page_library):
    _, answer = server.ask(clips / "film.mp4")
    address = answer["match"]["media"]["url"]
    content = (page_library.directory.parent / "media" / "film <b>.mp4").read_bytes()
    status, headers, body = server.request(address)
    assert (status, headers["content-type"]) == (200, "video/mp4")
    assert body == content
    status, headers, body = server.request(address, headers={"Range": "bytes=100-299"})
    assert status == 206
    assert headers["content-range"] == f"bytes 100-299/{len(content)}"
    assert body == content[100:300]
    assert server.request(address, headers={"Range": f"bytes={len(content)}-"})[0] == 416


def test_nothing_is_served_by_a_path_of_the_client(server):
    for path in (
        *("/media/0123456789abcdef01234567", "/media/../../../../etc/passwd", "/media//etc/passwd"),
        *("/media/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/media/etc/spectrogram/0/1"),
        *("/clips/..%2fapp.py", "/app.py", "/../app.py", "/..%2fapp.py"),
    ):
        status, _, body = server.request(path)
        assert (status, list(json.loads(body))) == (404, ["error"]), path


def test_sources_that_are_gone_or_from_memory_are_said_to_be(server, clips, page_library):
    _, answer = server.ask(clips / "memory.mkv")
    assert answer["match"]["title"] == "from memory"
    assert "was indexed from memory" in answer["match"]["media"]["error"]
    media = page_library.directory.parent / "media"
    # A long clip is compared from its beginning.
    _, answer = server.ask(media / "film <b>.mp4")
    assert answer["clip"]["seconds"] == pytest.approx(9.0, abs=0.2)
    assert answer["clip"]["compared_seconds"] == pytest.approx(8.0, abs=0.2)
    assert answer["match"]["title"] == "film <b>.mp4"
    (media / "film <b>.mp4").rename(media / "away.mp4")
    try:
        _, answer = server.ask(clips / "film.mp4")
        assert "is not there any more" in answer["match"]["media"]["error"]
        assert server.request(f"/media/{answer['match']['id']}")[0] == 404
    finally:
        (media / "away.mp4").rename(media / "film <b>.mp4")


def test_intervals_without_sense_are_refused(server, clips):
    _, answer = server.ask(clips / "old.mkv")
    whole = f"/media/{answer['match']['id']}"
    for interval, expected in (
        *(("5/5", 422), ("90/95", 422), ("-1/5", 404)),
        *(("0/nan", 404), ("x", 404)),
    ):
        status, _, body = server.request(f"{whole}/preview/{interval}")
        assert (status, list(json.loads(body))) == (expected, ["error"]), interval
    assert server.request(whole)[0] == 415


def test_other_names_and_other_sites_are_refused_and_may_not_send_clips(server, clips):
    for headers, status in (
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Host": "evil.example:80@127.0.0.1"}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "[evil"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ):
        assert server.request("/api/status", headers=headers)[0] == status, headers
    film = (clips / "film.mp4").read_bytes()
    for origin, status in (
        ("http://evil.example", 403),
        ("null", 403),
        (f"http://127.0.0.1:{server.port + 1}", 403),
        (server.address, 200),
    ):
        found, headers, _ = server.request("/api/query", film, {"Origin": origin})
        assert found == status
        assert not [name for name in headers if name.lower().startswith("access-control")]


def test_the_page_may_load_nothing_from_elsewhere(server):
    for path in ("/", "/page.css", "/page.js", "/api/status", "/nowhere"):
        _, headers, body = server.request(path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        outside = body.replace(b'"http://www.w3.org/2000/svg"', b"")
        assert b"http:" not in outside
        assert b"https:" not in outside


def test_changes_of_the_index_are_seen_and_damage_is_survived(server, clips, page_library):
    database = page_library.directory / "index.sqlite"
    index = FingerprintIndex.open(page_library.directory)
    index.add([("foreign", clip(77))])
    sound = database.read_bytes()
    try:
        assert server.ask(clips / "foreign.mp4")[1]["match"]["source"] == "foreign"
        made_with(page_library.directory, "0123456789abcdef")
        status, answer = server.ask(clips / "film.mp4")
        assert status == 500
        assert "was made with encoders 0123456789ab" in answer["error"]
        database.write_bytes(b"garbage" * 1000)
        status, answer = server.ask(clips / "film.mp4")
        assert status == 500
        assert "the file is damaged: index the media again" in answer["error"]
        assert "is damaged" in json.loads(server.request("/api/status")[2])["error"]
    finally:
        database.write_bytes(sound)
        index.remove(["foreign"])
    assert server.ask(clips / "foreign.mp4")[1]["match"] is None
    assert server.ask(clips / "film.mp4")[0] == 200


def made_with(directory, fingerprint):
    """Pretends that an index was made with other encoders."""
    with transaction(directory, write=True) as stored:
        encoder = stored.settings()["encoder"] | {"fingerprint": fingerprint}
        stored.write_settings({"encoder": encoder})


@pytest.mark.slow
def test_an_empty_index_says_how_to_fill_it_and_an_upload_ends_with_the_server(
    encoders, tmp_path, clips
):
    FingerprintIndex.create(tmp_path / "index", encoders, SETTINGS)
    film = clips / "film.mp4"
    with running(tmp_path / "index", tmp_path / "tmp") as process:
        status, answer = process.ask(film)
        assert status == 409
        assert "is empty: add media with `avcl-fingerprint add" in answer["error"]
        told = json.loads(process.request("/api/status")[2])
        assert (told["sources"], told["error"]) == (0, answer["error"])
        with holding_a_place(process, film) as (connection, body):
            connection.send(body[:1000])
            assert process.uploads()
            process.process.send_signal(signal.SIGINT)
            assert process.process.wait(timeout=600) == 0
    assert not list((tmp_path / "tmp").iterdir())
    assert len(process.messages) == 1  # of the request that was not waited for


async def never():
    await asyncio.Event().wait()


def test_neither_the_disk_nor_the_patience_is_used_up(tmp_path, monkeypatch):
    async def upload(receive):
        scope = {"type": "http", "headers": [], "query_string": b"name=a.mp4"}
        async with requests.uploaded(Request(scope, receive), tmp_path, 200 << 20):
            raise AssertionError("nothing arrived")

    async def bytes_arrive():
        return {"type": "http.request", "body": b"x" * 100_000, "more_body": True}

    monkeypatch.setattr(requests, "_IDLE_SECONDS", 0.01)
    with pytest.raises(HTTPException, match=r"of a\.mp4 arrived for 0 s") as refused:
        asyncio.run(upload(never))
    assert refused.value.status_code == 408
    monkeypatch.setattr(
        tempfile,
        "NamedTemporaryFile",
        lambda **_: open("/dev/full", "wb"),  # noqa: SIM115
    )
    with pytest.raises(HTTPException, match="is full: free some") as refused:
        asyncio.run(upload(bytes_arrive))
    assert refused.value.status_code == 507
    assert not list(tmp_path.iterdir())


def serve(monkeypatch, *options):
    """Runs the command up to where it would serve."""
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    return main(["serve", "--port=0", *options])


def test_what_cannot_be_served_is_said_at_once(page_library, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    index = f"--index={page_library.directory}"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "index.sqlite").write_bytes(b"garbage" * 1000)
    shutil.copytree(page_library.directory, tmp_path / "others")
    made_with(tmp_path / "others", "0123456789abcdef")
    for options, message in (
        ([f"--index={tmp_path / 'none'}"], "there is no fingerprint index in"),
        ([f"--index={tmp_path / 'broken'}"], "the file is damaged: index the media again"),
        ([f"--index={tmp_path / 'others'}"], "give the former, or index the media again"),
        ([index, f"--encoder={tmp_path}"], "neither checkpoints nor exported encoders"),
        ([index, "--host=192.0.2.1"], "cannot listen at 192.0.2.1"),
        ([index, "--max-upload-mb=0"], "--max-upload-mb 0.0 must be positive"),
        ([index, "--max-seconds=inf"], "--max-seconds inf must be positive and finite"),
        ([index, "--max-decode-seconds=0"], "--max-decode-seconds 0.0 must be positive"),
        ([index, "--max-waiting=-1"], "--max-waiting -1 must be at least 0"),
    ):
        assert serve(monkeypatch, *options) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_other_machines_come_in_only_where_asked_for_and_with_a_warning(
    page_library, monkeypatch, capsys
):
    index = f"--index={page_library.directory}"
    assert serve(monkeypatch, index) == 0
    output = capsys.readouterr()
    assert "on http://127.0.0.1:" in output.out
    assert output.err == ""
    assert serve(monkeypatch, index, "--host=0.0.0.0") == 0
    assert "warning: 0.0.0.0 is reached by other machines" in capsys.readouterr().err
