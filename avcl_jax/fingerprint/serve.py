"""`avcl-fingerprint serve`: a web page on this machine, on which a clip finds its source.

Starlette and uvicorn, because they read the body of an upload while it arrives, so that one that is
too long is refused before it fills a disk, and because they know ranges of files, by which browsers
seek.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import math
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.settings import FingerprintError

_STOP_SECONDS = 2


def run(arguments: argparse.Namespace) -> int:
    """Serves until it is interrupted.

    Raises:
        FingerprintError: if the index, its encoders or the address cannot be used.
        ExportError: if there are no encoders.
    """
    try:
        import uvicorn

        from avcl_jax.fingerprint.web.app import FingerprintApp
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise FingerprintError(
            "starlette and uvicorn are not installed, which the page needs: "
            "pip install -r requirements-fingerprint.txt"
        ) from error
    for name in ("max_upload_mb", "max_seconds", "max_decode_seconds"):
        if not 0 < getattr(arguments, name) < math.inf:
            raise FingerprintError(
                f"--{name.replace('_', '-')} {getattr(arguments, name)} must be positive and finite"
            )
    if arguments.max_waiting < 0:
        raise FingerprintError(f"--max-waiting {arguments.max_waiting} must be at least 0")
    host, port = arguments.host, arguments.port
    with contextlib.ExitStack() as stack:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = stack.enter_context(socket.create_server((host, port), family=family))
        except (OSError, OverflowError) as error:
            raise FingerprintError(
                f"cannot listen at {host} port {port} ({error}): give another --host or --port"
            ) from error
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="avcl-fingerprint-"))
        index = FingerprintIndex.open(arguments.index, arguments.encoder)
        app = FingerprintApp(index, Path(directory), arguments)
        address, port = listener.getsockname()[:2]
        if not ipaddress.ip_address(address).is_loopback:
            print(
                f"warning: {address} is reached by other machines; the page has no password, and "
                "whoever opens it sees the indexed files. --host 127.0.0.1 keeps it to this one",
                file=sys.stderr,
            )
        count, shown = len(index.sources()), f"[{address}]" if ":" in address else address
        print(
            f"{arguments.index}: {count} source{'s' * (count != 1)}, {index.num_segments} "
            f"segments, on http://{shown}:{port}/ (Ctrl+C stops)",
            flush=True,
        )
        names = {name.lower() for name in ("localhost", host, socket.gethostname())}
        config = uvicorn.Config(
            app.starlette(names),
            log_level="warning",
            log_config=None,  # its own would close the handlers of the whole process
            server_header=False,
            ws="none",
            proxy_headers=False,  # there is no proxy whose headers could be believed
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        # uvicorn ends orderly, and then raises the signal that ended it once more, which must not
        # leave the directory behind. A closed terminal counts as SIGTERM, unless under nohup.
        handlers: dict[signal.Signals, Any] = {signal.SIGTERM: signal.default_int_handler}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            handlers[signal.SIGHUP] = lambda *_: signal.raise_signal(signal.SIGTERM)
        for number, handler in handlers.items():
            stack.callback(signal.signal, number, signal.signal(number, handler))
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    return 0
