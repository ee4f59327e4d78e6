"""`avcl-fingerprint serve`: a web page on this machine, on which a clip finds its source.

Starlette and uvicorn, because they read the body of an upload while it arrives, so that one that is
too long is refused before it fills a disk, and because they know ranges of files, by which browsers
seek.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from avcl_jax.compilation_cache import keep_compiled
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.settings import FingerprintError

_STOP_SECONDS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""

    def option(flag: str, default: Any, text: str) -> None:
        text = f"{text} (default: %(default)s)"
        parser.add_argument(flag, type=type(default), default=default, help=text)

    parser.add_argument(
        "--encoder", metavar="PATH", help="where the encoders are now, if they were moved"
    )
    option("--host", "127.0.0.1", "address to listen at; any other lets other machines in")
    option("--port", 8021, "port to listen at, 0 for a free one")
    option("--max-upload-mb", 200.0, "larger clips are refused unread")
    seconds = "seconds of a clip that are compared, from its beginning"
    option("--max-seconds", 120.0, seconds)
    option("--max-decode-seconds", 120.0, "seconds to decode or convert a clip")
    option("--max-waiting", 4, "clips that may wait while one is compared")


def run(arguments: argparse.Namespace) -> int:
    """Serves until it is interrupted.

    Raises:
        FingerprintError: if the index, its encoders or the address cannot be used.
        ExportError: if there are no encoders.
    """
    import uvicorn

    from avcl_jax.fingerprint.web.app import FingerprintApp

    host, port = arguments.host, arguments.port
    with contextlib.ExitStack() as stack:
        # Every way to end leaves no directory behind. A terminal may close, unless under nohup.
        numbers = [signal.SIGINT, signal.SIGTERM]
        numbers += [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)
        received: list[int] = []

        def interrupt(number: int, _: object) -> None:
            received.append(number)
            raise KeyboardInterrupt

        for number in numbers:
            stack.callback(signal.signal, number, signal.signal(number, interrupt))
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = stack.enter_context(socket.create_server((host, port), family=family))
        except (OSError, OverflowError) as error:
            raise FingerprintError(
                f"cannot listen at {host} port {port} ({error}): give another --host or --port"
            ) from error
        index = FingerprintIndex.open(arguments.index, arguments.encoder)
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="avcl-fingerprint-"))
        keep_compiled()
        app = FingerprintApp(index, Path(directory), arguments)
        stack.callback(app.close)
        address, port = listener.getsockname()[:2]
        if not ipaddress.ip_address(address).is_loopback:
            print(
                f"warning: {address} is reached by other machines; the page has no password, and "
                "whoever opens it sees the indexed files. --host 127.0.0.1 keeps it to this one",
                file=sys.stderr,
            )
        shown = f"[{address}]" if ":" in address else address
        print(
            f"{arguments.index}: {index.size}, on http://{shown}:{port}/ (Ctrl+C stops)", flush=True
        )
        config = uvicorn.Config(
            app.starlette({"localhost", host.lower(), socket.gethostname().lower()}),
            log_level="warning",
            log_config=None,  # its own would close the handlers of the whole process
            server_header=False,
            ws="none",
            lifespan="off",
            proxy_headers=False,  # there is no proxy whose headers could be believed
            timeout_graceful_shutdown=_STOP_SECONDS,
        )

        class Server(uvicorn.Server):
            def handle_exit(self, *_: Any) -> None:
                # A second signal, which `timeout` sends at once, must not drop what the first ends.
                self.should_exit = True

        server = Server(config)
        # Requests that have not ended after `_STOP_SECONDS`: told in one line, not each by another.
        logging.getLogger("uvicorn.error").addFilter(
            lambda record: not (record.exc_info and record.exc_info[0] is asyncio.CancelledError)
        )
        for number in numbers:
            signal.signal(number, server.handle_exit)
        # In a callback of the garbage collector an exception ends nothing.
        server.should_exit = bool(received)
        server.run(sockets=[listener])
    return 0
