"""The page's server as a process: what it answers, refuses, serves, and leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import av
import pytest

pytest.importorskip("faiss", reason="the extra fingerprint is not installed")
pytest.importorskip("starlette", reason="the extra fingerprint is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra fingerprint is not installed")

from starlette.requests import Request  # noqa: E402  # after the skips

from avcl_jax.fingerprint.calibration import THRESHOLD  # noqa: E402
from avcl_jax.fingerprint.command import main  # noqa: E402
from avcl_jax.fingerprint.index import FingerprintIndex  # noqa: E402
from avcl_jax.fingerprint.web import upload  # noqa: E402
from avcl_jax.fingerprint.web.refusal import Refusal  # noqa: E402
from avcl_jax.fingerprint.web.workplace import workplace  # noqa: E402
from tests.fingerprint.conftest import SETTINGS  # noqa: E402
from tests.fingerprint.page_server import ROOT, make_clips, make_library, running  # noqa: E402
from tests.fingerprint.synthetic import clip  # noqa: E402

LIMIT_MB = 2


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips") / "clips")


@pytest.fixture(scope="module")
def page_library(encoders, tmp_path_factory):
    """What the server of this module searches; a test that changes it changes it back."""
    return make_library(tmp_path_factory.mktemp("page"), encoders)


@pytest.fixture(scope="module")
def server(page_library, tmp_path_factory):
    options = (f"--max-upload-mb={LIMIT_MB}", "--max-waiting=1", "--max-seconds=8")
    temporary = tmp_path_factory.mktemp("page_tmp") / "tmp"
    with running(page_library.directory, temporary, *options) as process:
        yield process
    assert process.process.returncode == 0
    assert not [line for line in process.messages if "Traceback" in line], process.messages
    assert not list(temporary.iterdir())


def test_a_clip_finds_its_source_and_its_place(server, clips):
    status, answer = server.ask(clips / "film.mp4")
    assert status == 200
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
        alike = [segment[modality] > 2 for segment in segments]
        assert sum(alike) > 0.7 * len(alike)
    assert answer["clip"]["converted_url"] is None
    assert not server.uploads()


def test_stages_are_told_while_it_is_compared(server, clips):
    _, headers, body = server.request(
        "/api/query?name=film.mp4",
        (clips / "film.mp4").read_bytes(),
        {"Accept": "application/x-ndjson"},
    )
    assert headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in body.splitlines()]
    assert lines[0] == {"stage": "waiting", "before": 0}
    assert [line["stage"] for line in lines[1:3]] == ["decoding", "comparing"]
    assert lines[-1]["answer"]["match"]["title"] == "film <b>.mp4"
    assert len(lines) == 4


def test_no_match_is_an_answer(server, clips):
    status, answer = server.ask(clips / "foreign.mp4")
    assert status == 200
    assert answer["match"] is None
    assert answer["candidates"]
    assert not any(candidate["accepted"] for candidate in answer["candidates"])


def test_what_has_to_match_is_chosen_and_what_is_silent_is_said(server, clips):
    _, answer = server.ask(clips / "dubbed.mkv")
    assert (answer["required"], answer["sources"]) == ([], [answer["match"]["name"]])
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


def test_what_browsers_do_not_play_is_converted(server, clips, tmp_path):
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
    whole = media["converted_url"].split("/preview")[0]
    assert server.request(whole)[0] == 415


def test_sound_alone_has_a_picture(server, clips):
    _, answer = server.ask(clips / "sound.wav")
    assert answer["match"]["title"] == "sound.wav"
    status, _, body = server.request(answer["match"]["media"]["sound_url"])
    assert status == 200
    for sound in (answer["clip"]["sound"], json.loads(body)):
        assert sound["columns"] > 100
        assert sound["rows"] == 64
    assert answer["clip"]["sound"]["seconds"] == pytest.approx(4.5, abs=0.01)


@pytest.mark.parametrize(
    ("name", "status", "parts"),
    [
        ("notes.mp4", 422, ["notes.mp4 cannot be compared: not a film", "Give another file"]),
        ("cut.mkv", 422, ["cut.mkv cannot be compared", "Give another file"]),
        ("short.mkv", 422, ["short.mkv lasts 0.", "found 0.", "give a longer one"]),
        ("empty.mp4", 400, ["empty.mp4 is empty, 0 bytes", "choose another file"]),
    ],
)
def test_what_cannot_be_compared_is_named_and_the_server_goes_on(
    server, clips, name, status, parts
):
    found, answer = server.ask(clips / name)
    assert found == status
    assert list(answer) == ["error"]
    assert "\n" not in answer["error"]
    assert str(server.temporary) not in answer["error"]
    for part in parts:
        assert part in answer["error"]
    assert not server.uploads()
    assert server.ask(clips / "film.mp4")[1]["match"]["title"] == "film <b>.mp4"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGALRM, "reading it takes longer than 120 s, the --max-decode-seconds"),
        (signal.SIGSEGV, "the decoder ended with SIGSEGV"),
    ],
)
def test_a_clip_that_ends_its_reader_is_refused_and_the_next_compared(server, clips, number, said):
    film = clips / "film.mp4"
    server.ask(film)  # so that the processes run
    readers = server.media_processes()
    assert readers
    for reader in readers:
        os.kill(reader, signal.SIGSTOP)
    with holding_a_place(server, film) as (connection, body):
        connection.send(body)
        answer = connection.getresponse()
        assert [json.loads(answer.readline())["stage"] for _ in range(2)] == ["waiting", "decoding"]
        for reader in readers:
            os.kill(reader, number)
            os.kill(reader, signal.SIGCONT)
        last = json.loads(answer.readline())
    assert last == {
        "error": f"film.mp4 cannot be compared: {said}. Give another file",
        "status": 422,
    }
    assert not server.uploads()
    assert server.ask(film)[1]["match"]["title"] == "film <b>.mp4"
    assert not set(readers) & set(server.media_processes())


def test_the_name_of_a_clip_is_shown_and_nothing_else(server, clips):
    _, answer = server.ask(clips / "foreign.mp4", "../../etc/pass\nwd<script>.mp4")
    assert answer["clip"]["name"] == "passwd<script>.mp4"
    _, answer = server.ask(clips / "notes.mp4", "C:\\films\\" + "x" * 400)
    assert answer["error"].startswith("x" * 200 + " ")


def test_two_gigabytes_are_refused_by_their_header(server):
    with contextlib.closing(server.connect()) as connection:
        connection.putrequest("POST", "/api/query?name=film.mp4")
        connection.putheader("Content-Length", str(2 << 30))
        connection.endheaders()  # and not one byte of the body
        answer = connection.getresponse()
        assert answer.status == 413
        assert (
            "the clip has 2048 MB, at most 2 MB are taken: cut it, or"
            in (json.loads(answer.read())["error"])
        )
    assert not server.uploads()


def test_a_body_of_unknown_length_is_refused_where_it_passes_the_limit(server):
    sent = 0
    with contextlib.closing(server.connect()) as connection:
        connection.putrequest("POST", "/api/query?name=film.mp4")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        block = b"x" * 65536
        # A socket takes more than has been read: what is counted is what the server lets in.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < (1 << 30):
                connection.send(b"10000\r\n" + block + b"\r\n")
                sent += len(block)
    assert sent < 64 << 20
    server.wait_until_no_upload_is_left()


def test_an_upload_that_breaks_off_leaves_nothing(server, clips):
    with holding_a_place(server, clips / "film.mp4") as (connection, _):
        connection.send(b"\0" * 1000)
        assert server.uploads()
        connection.close()
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
        assert "2 clips are being compared or wait" in answer["error"]
        for before, (connection, body) in enumerate((first, second)):
            connection.send(body)
            answer = connection.getresponse()
            lines = [json.loads(line) for line in answer.read().splitlines()]
            assert lines[0] == {"stage": "waiting", "before": before}
            assert lines[-1]["answer"]["match"]["title"] == "film <b>.mp4"
    assert server.ask(film)[0] == 200


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


@pytest.mark.parametrize(
    "path",
    [
        "/media/0123456789abcdef01234567",
        "/media/../../../../etc/passwd",
        "/media/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/media//etc/passwd",
        "/clips/..%2fowner.lock",
        "/clips/owner.lock",
        "/page.py",
        "/../app.py",
        "/api/sources/etc/sound",
    ],
)
def test_nothing_is_served_by_a_path_of_the_client(server, path):
    status, _, body = server.request(path)
    assert status == 404
    assert list(json.loads(body)) == ["error"]


def test_sources_that_are_gone_or_from_memory_are_said_to_be(server, clips, page_library):
    _, answer = server.ask(clips / "memory.mkv")
    assert answer["match"]["title"] == "from memory"
    assert "was indexed from memory" in answer["match"]["media"]["error"]
    media = page_library.directory.parent / "media"
    (media / "film <b>.mp4").rename(media / "away.mp4")
    try:
        _, answer = server.ask(clips / "film.mp4")
        assert "is not there any more" in answer["match"]["media"]["error"]
        assert server.request(f"/media/{answer['match']['id']}")[0] == 404
    finally:
        (media / "away.mp4").rename(media / "film <b>.mp4")


@pytest.mark.parametrize("query", ["start=5&end=5", "start=-1", "end=nan", "end=inf", "start=x"])
def test_intervals_without_sense_are_refused(server, clips, query):
    _, answer = server.ask(clips / "old.mkv")
    status, _, body = server.request(f"/media/{answer['match']['id']}/preview?{query}")
    assert status == 400
    assert "give" in json.loads(body)["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Host": "evil.example:80@127.0.0.1"}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "[evil"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_other_names_and_other_sites_are_refused(server, headers, status):
    assert server.request("/api/status", headers=headers)[0] == status


def test_another_sites_page_may_not_send_clips(server, clips):
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
    manifest = page_library.directory / "manifest.json"
    index = FingerprintIndex.open(page_library.directory)
    index.add([("foreign", clip(77))])
    try:
        assert server.ask(clips / "foreign.mp4")[1]["match"]["name"] == "foreign"
        added = manifest.read_text()
        for damaged, message in (
            ("{", "manifest.json is damaged: index the media again"),
            (added.replace('"fingerprint": "', '"fingerprint": "0'), "was made with encoders 0"),
        ):
            manifest.write_text(damaged)
            status, answer = server.ask(clips / "film.mp4")
            assert status == 500
            assert message in answer["error"]
        manifest.write_text("{")
        assert "is damaged" in json.loads(server.request("/api/status")[2])["error"]
    finally:
        manifest.write_text(added)
        index.remove(["foreign"])
    assert server.ask(clips / "foreign.mp4")[1]["match"] is None
    assert server.ask(clips / "film.mp4")[0] == 200


def test_a_long_clip_is_compared_from_its_beginning(server, clips, page_library):
    film = page_library.directory.parent / "media" / "film <b>.mp4"
    _, answer = server.ask(film)
    assert answer["clip"]["seconds"] == pytest.approx(9.0, abs=0.2)
    assert answer["clip"]["compared_seconds"] == pytest.approx(8.0, abs=0.2)
    assert answer["match"]["title"] == "film <b>.mp4"


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
            assert process.process.wait(timeout=60) == 0
    assert not list((tmp_path / "tmp").iterdir())


async def never():
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("free_bytes", "idle_seconds", "status", "message"),
    [(300 << 20, 60.0, 507, "is almost full: free some"), (1 << 40, 0.01, 408, "of a.mp4 arrived")],
)
def test_neither_the_disk_nor_the_patience_is_used_up(
    tmp_path, monkeypatch, free_bytes, idle_seconds, status, message
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes))
    monkeypatch.setattr(upload, "_IDLE_SECONDS", idle_seconds)
    headers = [(b"content-length", str(100 << 20).encode())]
    scope = {"type": "http", "headers": headers, "query_string": b"name=a.mp4"}

    async def attempt():
        async with upload.received(Request(scope, never), tmp_path, 200 << 20):
            raise AssertionError("nothing was sent")

    with pytest.raises(Refusal, match=message) as refused:
        asyncio.run(attempt())
    assert refused.value.status == status
    assert not list(tmp_path.iterdir())


def test_what_a_killed_server_left_is_deleted_by_the_next(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from avcl_jax.fingerprint.web.workplace import workplace\n"
        "with workplace(pathlib.Path(sys.argv[1])) as directory:\n"
        "    (directory / 'clip-1.mp4').touch()\n"
        "    print(directory, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    left = process.stdout.readline().strip()
    foreign = tmp_path / "avcl-fingerprint-link"
    foreign.symlink_to(ROOT)
    with workplace(tmp_path):
        assert os.path.exists(f"{left}/clip-1.mp4")  # its owner lives
    process.kill()
    process.communicate()
    with workplace(tmp_path) as directory:
        assert sorted(tmp_path.iterdir()) == sorted([directory, foreign])
    assert list(tmp_path.iterdir()) == [foreign]


def serve(monkeypatch, *options):
    """Runs the command up to where it would serve."""
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    return main(["serve", "--port=0", *options])


def test_what_cannot_be_served_is_said_at_once(page_library, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    index = f"--index={page_library.directory}"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    shutil.copytree(page_library.directory, tmp_path / "others")
    manifest = (tmp_path / "others" / "manifest.json").read_text()
    other = manifest.replace('"fingerprint": "', '"fingerprint": "0')
    (tmp_path / "others" / "manifest.json").write_text(other)
    for options, message in (
        ([f"--index={tmp_path / 'none'}"], "there is no fingerprint index in"),
        ([f"--index={tmp_path / 'broken'}"], "manifest.json is damaged: index the media again"),
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
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", index]) == 2
    assert "pip install -r requirements-fingerprint.txt" in capsys.readouterr().err


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
