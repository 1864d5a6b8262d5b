"""What every request has to keep to before anything is worked out, and what every answer carries.

Requests come from this page only: a link from elsewhere may open it, no other site may call its
API through a visitor's browser. Answers may not be framed, sniffed, or load anything from outside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders

from mhcplan.web.whatif import MAX_QUERY_BYTES

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_OWN = ("same-origin", "none")  # "none": typed, or asked for by a program
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src"
        " 'self'; img-src 'self' data: blob:; form-action 'none'; frame-ancestors 'none';"
        " base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Guard:
    """ASGI middleware: refuses what is too long or foreign, adds headers."""

    def __init__(self, app: ASGIApp) -> None:
        """``app`` answers what passes."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refusal = _refusal(scope)
        if refusal is not None:
            status, text = refusal
            response = JSONResponse({"message": text, "field": None}, status)
            await response(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


def _refusal(scope: Scope) -> tuple[int, str] | None:
    """Status and reason, if a request goes no further."""
    length = len(scope["query_string"])
    if length > MAX_QUERY_BYTES:
        return 414, f"the address has {length} bytes, at most {MAX_QUERY_BYTES} are read"
    site = Headers(scope=scope).get("sec-fetch-site", "none")
    if site not in _OWN and scope["path"].startswith("/api/"):
        return 403, "another site's page may not ask here"
    return None
