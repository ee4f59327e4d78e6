"""Object store of this process, which counts requests: Google's JSON interface in memory.

gcsfs, through which the package reads and writes gs://, and Google's own client of tensorboardX
send their requests to the address in STORAGE_EMULATOR_HOST, in child processes too; tensorstore, by
which orbax writes arrays, to that in TENSORSTORE_GCS_HTTP_URL.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_OBJECT = re.compile(
    r"(/download)?/storage/v1/b/([^/]+)/o/([^/]+)(?:/(moveTo|rewriteTo/b/[^/]+)/o/(.+))?"
)
_LIST = re.compile(r"(/upload)?/storage/v1/b/([^/]+)/o")
_PAGE = 1000


class Request(NamedTuple):
    """One request: its kind (list, stat, download, upload, move or delete) and its object."""

    kind: str
    name: str  # a folder for "list"


class Store(http.server.ThreadingHTTPServer):
    """Store whose buckets exist as soon as they are named.

    Attributes:
        content: content of each object, named BUCKET/KEY.
        requests: all requests so far, in the order of arrival.
        sent_bytes: bytes of all answers so far, without their headers.
        failing: objects whose requests are answered with 503.
        busy: every twentieth request is answered with 503.
        at_once: requests that wait for their answers now.
        awaited: number of requests that must wait before any is answered, for at most a minute.
        environment: variables that send a process to this store.
    """

    daemon_threads = True
    # Clients open as many connections at once as they send requests.
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content: dict[str, bytes] = {}
        self.written: dict[str, str] = {}  # generations
        self.requests: list[Request] = []
        self.sent_bytes = 0
        self.failing: set[str] = set()
        self.busy = False
        self.at_once = self.awaited = 0
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.lock = threading.Lock()
        self.arrived = threading.Condition(self.lock)
        self.environment: Mapping[str, str] = {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self.server_port}",
            "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{self.server_port}",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # of tensorstore
            # Otherwise gcsfs asks Google itself for the kind of each bucket.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "FSSPEC_GS_TOKEN": "anon",
            "FSSPEC_GCS_TOKEN": "anon",
        }

    def handle_error(self, *_: object) -> None:
        """Stays silent: clients close connections before the answer, where another was enough."""
        if not isinstance(sys.exception(), ConnectionError):
            raise

    def put(self, name: str, content: bytes) -> None:
        """Writes an object."""
        with self.lock:
            self.content[name] = content
            self.written[name] = str(time.time_ns())

    def about(self, name: str) -> dict[str, Any]:
        """Returns the description of an object."""
        bucket, _, key = name.partition("/")
        generation = self.written[name]
        updated = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(int(generation) // 10**9))
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": key,
            "size": str(len(self.content[name])),
            "updated": f"{updated}.{int(generation) // 10**6 % 1000:03d}Z",
            "generation": generation,
            "etag": generation,
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Store
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Stays silent."""

    def _answer(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with self.server.lock:
            self.server.sent_bytes += len(body)
        self.wfile.write(body)

    def _handle(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.arrived:
            self.server.at_once += 1
            if self.server.at_once >= self.server.awaited:
                self.server.awaited = 0
                self.server.arrived.notify_all()
            self.server.arrived.wait_for(lambda: not self.server.awaited, timeout=60)
            self.server.at_once -= 1
        if found := _OBJECT.fullmatch(address.path):
            download, bucket, *rest = found.groups()
            key, action, target = (urllib.parse.unquote(part or "") for part in rest)
            self._object(bool(download) or query.get("alt") == "media", bucket, key, action, target)
        elif found := _LIST.fullmatch(address.path):
            if found[1]:
                self._upload(found[2], query, body)
            else:
                self._list(found[2], query)
        else:  # a bucket
            self._count("stat", address.path.rpartition("/")[2])
            self._answer({"kind": "storage#bucket"})

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _count(self, kind: str, name: str) -> None:
        with self.server.lock:
            self.server.requests.append(Request(kind, name))

    def _object(self, download: bool, bucket: str, key: str, action: str, target: str) -> None:
        store, name = self.server, f"{bucket}/{key}"
        kinds = {"GET": "download" if download else "stat", "POST": "move", "DELETE": "delete"}
        kind = kinds[self.command]
        self._count(kind, name)
        if self._fails(name):
            self._answer({"error": {"message": "try again"}}, 503)
        elif name not in store.content:
            self._answer({"error": {"message": f"No such object: {name}"}}, 404)
        elif kind == "stat":
            self._answer(store.about(name))
        elif kind == "download":
            content = store.content[name]
            if limits := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                content = content[int(limits[1]) : int(limits[2] or len(content)) + 1]
            end = int(limits[1]) + len(content) - 1 if limits else 0
            whole = len(store.content[name])
            headers = {"Content-Range": f"bytes {limits[1]}-{end}/{whole}"} if limits else {}
            headers["x-goog-generation"] = store.written[name]
            self._answer(content, 206 if limits else 200, **headers)
        elif kind == "move":
            store.put(f"{bucket}/{target}", store.content[name])
            if action == "moveTo":
                del store.content[name]
            self._answer({"done": True, **store.about(f"{bucket}/{target}")})
        else:
            del store.content[name]
            self._answer(status=204)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        self._count("list", f"{bucket}/{prefix}")
        items: list[dict[str, Any]] = []
        folders: dict[str, None] = {}
        with self.server.lock:
            for name in sorted(self.server.content):
                if not name.startswith(f"{bucket}/{prefix}"):
                    continue
                key = name.partition("/")[2]
                inside, slash, _ = key[len(prefix) :].partition(delimiter or "\0")
                if slash:
                    folders[prefix + inside + delimiter] = None
                else:
                    items.append(self.server.about(name))
        first = int(query.get("pageToken", 0))
        last = first + min(_PAGE, int(query.get("maxResults", _PAGE)))
        answer: dict[str, Any] = {"kind": "storage#objects", "prefixes": list(folders)}
        answer["items"] = items[first:last]
        if last < len(items):
            answer["nextPageToken"] = str(last)
        self._answer(answer)

    def _fails(self, name: str) -> bool:
        store = self.server
        return name in store.failing or (store.busy and len(store.requests) % 20 == 0)

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        store = self.server
        if query["uploadType"] == "multipart":
            # Description and content, each behind the lines of its headers.
            end = b"--" + self.headers["Content-Type"].partition('boundary="')[2][:-1].encode()
            about, content = (
                re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1]
                for part in re.split(rb"(?:^|\r?\n)" + re.escape(end), body)[1:3]
            )
            self._write(f"{bucket}/{json.loads(about)['name']}", query, content)
        elif query["uploadType"] == "media":
            self._write(f"{bucket}/{query['name']}", query, body)
        elif "upload_id" not in query:
            name = f"{bucket}/{query['name']}"
            number = str(len(store.uploads))
            store.uploads[number] = (name, bytearray())
            self._count("upload", name)
            place = f"/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
            self._answer(Location=store.environment["STORAGE_EMULATOR_HOST"] + place)
        else:
            name, content = store.uploads[query["upload_id"]]
            content += body
            self._count("upload", name)
            if self.headers["Content-Range"].endswith("/*"):
                self._answer(status=308, Range=f"bytes=0-{len(content) - 1}")
            else:
                store.put(name, bytes(content))
                self._answer(store.about(name))

    def _write(self, name: str, query: dict[str, str], content: bytes) -> None:
        """Writes an object, unless another generation than the one expected is there."""
        store = self.server
        self._count("upload", name)
        present = store.written.get(name, "0") if name in store.content else "0"
        if self._fails(name):
            self._answer({"error": {"message": "try again"}}, 503)
        elif query.get("ifGenerationMatch", present) != present:
            self._answer({"error": {"message": "another generation"}}, 412)
        else:
            store.put(name, content)
            self._answer(store.about(name))


@contextlib.contextmanager
def running() -> Iterator[Store]:
    """Yields a store that answers."""
    with Store() as store:
        thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield store
        finally:
            store.shutdown()
            thread.join()
