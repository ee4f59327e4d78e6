"""`avcl-fingerprint serve`: a web page on this machine, on which a clip finds its source.

Starlette and uvicorn, because the body of an upload is met while it arrives: one that is too long
is refused by its header, before it fills a disk. They also know ranges of files, which browsers
need to seek in a film, and bring no more than three small packages.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import math
import signal
import socket
import sys
from collections.abc import Iterator

from avcl_jax.fingerprint.error import FingerprintError
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.paths import local_path

_STOP_SECONDS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the command."""
    parser.add_argument("--index", type=local_path, required=True, metavar="DIR", help="the index")
    parser.add_argument(
        "--encoder", metavar="PATH", help="where the encoders are now, if they were moved"
    )
    for name, kind, default, what in (
        ("--host", str, "127.0.0.1", "address to listen at; any other lets other machines in"),
        ("--port", int, 8021, "port to listen at, 0 for a free one"),
        ("--max-upload-mb", float, 200.0, "larger clips are refused unread"),
        ("--max-seconds", float, 120.0, "how much of a clip is compared, from its beginning"),
        ("--max-decode-seconds", float, 120.0, "that reading a clip, or converting it, may take"),
        ("--max-waiting", int, 4, "clips that may wait while one is compared"),
    ):
        parser.add_argument(name, type=kind, default=default, help=f"{what} (default: {default})")


def run(arguments: argparse.Namespace) -> int:
    """Serves until it is interrupted.

    Raises:
        FingerprintError: if the index, its encoders or the address cannot be used.
        ExportError: if there are no encoders.
    """
    try:
        import starlette  # noqa: F401  # named in the message, used by the modules below
        import uvicorn
    except ImportError as error:
        raise FingerprintError(
            "starlette and uvicorn are not installed, which the page needs: "
            "pip install -r requirements-fingerprint.txt"
        ) from error
    from avcl_jax.fingerprint.web.app import Site
    from avcl_jax.fingerprint.web.desk import Desk
    from avcl_jax.fingerprint.web.shelf import Shelf
    from avcl_jax.fingerprint.web.workplace import workplace

    for name in ("max_upload_mb", "max_seconds", "max_decode_seconds"):
        if not 0 < getattr(arguments, name) < math.inf:
            raise FingerprintError(
                f"--{name.replace('_', '-')} {getattr(arguments, name)} must be positive and finite"
            )
    if arguments.max_waiting < 0:
        raise FingerprintError(f"--max-waiting {arguments.max_waiting} must be at least 0")
    with _listen(arguments.host, arguments.port) as listener, workplace() as directory:
        desk = Desk(
            FingerprintIndex.open(arguments.index, arguments.encoder),
            max_waiting=arguments.max_waiting,
            max_seconds=arguments.max_seconds,
            max_decode_seconds=arguments.max_decode_seconds,
        )
        site = Site(
            desk,
            Shelf(directory, max_decode_seconds=arguments.max_decode_seconds),
            directory=directory,
            max_upload_bytes=int(arguments.max_upload_mb * (1 << 20)),
        )
        names = {"localhost", arguments.host, socket.gethostname()}
        host, port = listener.getsockname()[:2]
        if not ipaddress.ip_address(host).is_loopback:
            print(
                f"warning: {host} is reached by other machines; the page has no password, and "
                "whoever opens it sees the indexed files. --host 127.0.0.1 keeps it to this one",
                file=sys.stderr,
            )
        shown = f"[{host}]" if ":" in host else host
        count = len(desk.sources())
        print(
            f"{arguments.index}: {count} source{'s' * (count != 1)}, {desk.num_segments()} "
            f"segments, on http://{shown}:{port}/ (Ctrl+C stops)",
            flush=True,
        )
        server = uvicorn.Server(
            uvicorn.Config(
                site.application(names),
                log_level="warning",
                # Its own way to log would close the handlers of everyone else in the process.
                log_config=None,
                server_header=False,
                # Nothing but HTTP is spoken, and nobody stands in front whose headers could say
                # from where a request comes.
                ws="none",
                proxy_headers=False,
                timeout_graceful_shutdown=_STOP_SECONDS,
            )
        )
        # uvicorn ends orderly, then sends itself once more the signal that ended it, which by
        # default would leave the directory behind. A terminal that closes sends another one.
        with contextlib.suppress(KeyboardInterrupt), _signals_end_orderly():
            server.run(sockets=[listener])
    return 0


@contextlib.contextmanager
def _signals_end_orderly() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def terminate(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    before = {}
    for number, handler in ((signal.SIGTERM, interrupt), (signal.SIGHUP, terminate)):
        # Under nohup it stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _listen(host: str, port: int) -> socket.socket:
    listener = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(64)
    except (OSError, OverflowError) as error:
        if listener is not None:
            listener.close()
        raise FingerprintError(
            f"cannot listen at {host} port {port} ({error}): give another --host or --port"
        ) from error
    return listener
