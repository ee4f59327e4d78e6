"""What keeps other pages and other machines out of a server meant for its user alone.

- A foreign page whose name is made to point at this machine (DNS rebinding) still sends its own
  name as Host: only addresses, localhost and this machine's names are answered.
- A foreign page may send requests here without reading the answers: it is refused everything but
  a link to the page. No CORS header ever allows more.
- The page itself loads nothing and runs nothing but what this server sends.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Safety:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, names: Collection[str]):
        """Takes what it guards, and the names of this machine that are answered."""
        self._app = app
        self._names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers or refuses one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        refusal = None
        if not self._answers_to(host):
            refusal = (
                f"Host {host[:100]!r} is not this server: open it by its address, "
                "http://127.0.0.1 with its port, or by localhost"
            )
        elif scope["method"] not in ("GET", "HEAD") and origin not in (None, f"http://{host}"):
            refusal = f"a page of {str(origin)[:100]!r} asks: only this server's own page may"
        elif scope["path"] != "/" and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            refusal = "another site's page asks: only this server's own page may"
        if refusal is not None:
            await JSONResponse({"error": refusal}, 403)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _answers_to(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        # An address is no name, so that nobody's name server decides where it leads.
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
