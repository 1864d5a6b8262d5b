"""The server: routes, limits and headers around :mod:`mhcplan.web.answers`.

The API takes the query of the page (:mod:`mhcplan.web.whatif`) and works nothing out itself. What
is refused comes as ``{"message", "field"}``: one line, and the name in the query of the field to
blame. Files come from a fixed table, never from a path in a request.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mhcplan.web import answers, sweeps
from mhcplan.web.controls import controls
from mhcplan.web.guard import Guard
from mhcplan.web.whatif import Refused, WhatIf, parse_query
from mhcplan.web.workers import Busy, Workers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    T = TypeVar("T")

MAX_BODY_BYTES = 1 << 16
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1", "[::1]")
_GONE = 499  # as servers log a client that did not wait; nobody reads it
_REFUSED, _BUSY, _NOT_MODIFIED = 422, 503, 304
_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_WEB = (
    "api.js",
    "inputs.js",
    "plots.js",
    "state.js",
    "sweeps.js",
    "theme.js",
    "whatif.css",
    "whatif.js",
)
_PLANNER = ("page.css", "timeline.js", "toolbar.js")
_FILES = {  # name in the address: package, and path in it
    "": ("mhcplan.web", "static/index.html"),
    **{name: ("mhcplan.web", f"static/{name}") for name in _WEB},
    **{name: ("mhcplan.planner.figures", f"static/{name}") for name in _PLANNER},
    "plotly.min.js": ("plotly", "package_data/plotly.min.js"),
}


@dataclass(frozen=True)
class Settings:
    """What the person who starts the server decides.

    Attributes:
        profiles: names that a what-if may give as its profile.
        hosts: host names that browsers may ask for; ``*``: any.
        limit_seconds: what one simulation may take.
    """

    profiles: tuple[str, ...]
    hosts: tuple[str, ...] = LOOPBACK_HOSTS
    limit_seconds: float = 30


def create_app(settings: Settings) -> FastAPI:
    """The application; its worker processes live as long as it serves."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        app.state.workers = Workers(settings.limit_seconds)
        try:
            yield
        finally:
            await asyncio.to_thread(app.state.workers.close)

    app = FastAPI(title="mhcplan", lifespan=lifespan, openapi_url=None)
    app.state.settings = settings
    app.add_middleware(Guard)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts))
    for error, say in (
        (Refused, _say_refused),
        (Busy, _say_busy),
        (HTTPException, _say_http),
        (Exception, _say_bug),
    ):
        app.add_exception_handler(error, say)
    for path, answer in (
        ("/", _page),
        ("/static/{name}", _static),
        ("/api/controls", _controls),
        ("/api/status", _status),
        ("/api/answer", _answer),
        ("/api/timeline", _timeline),
        ("/api/certainty", _certainty),
        ("/api/sweep/{kind}", _sweep),
        ("/api/download/{kind}", _download),
    ):
        app.get(path)(answer)
    app.post("/api/open")(_open)
    return app


# -- routes ----------------------------------------------------------------------------------------


def _page(request: Request) -> Response:
    return _static(request, "")


def _static(request: Request, name: str) -> Response:
    if name not in _FILES:
        raise HTTPException(404)
    content, tag, media_type = _file(*_FILES[name])
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=_NOT_MODIFIED, headers={"ETag": tag})
    return Response(content, media_type=media_type, headers={"ETag": tag})


def _controls(request: Request) -> dict[str, Any]:
    return controls(request.app.state.settings.profiles)


def _status(request: Request) -> dict[str, Any]:
    return request.app.state.workers.status()


async def _answer(request: Request) -> Response:
    whatif, pinned = _asked(request)
    return await _json(request, answers.answer, whatif, pinned)


async def _timeline(request: Request) -> Response:
    return await _json(request, answers.timeline, _asked(request)[0])


async def _certainty(request: Request) -> Response:
    return await _json(request, answers.how_sure, _asked(request)[0])


async def _download(request: Request, kind: str) -> Response:
    name, content = await _worked_out(request, answers.download, _asked(request)[0], kind)
    return Response(
        content,
        media_type="application/octet-stream",
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


async def _open(request: Request) -> Response:
    """The query of the plan file in the body."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise Refused(f"a plan file of more than {MAX_BODY_BYTES} bytes is not read")
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise Refused("the plan file is not a text in UTF-8") from None
    return await _json(request, answers.open_plan, text)


async def _sweep(request: Request, kind: str) -> Response:
    """A line of JSON a point: how far it is, what is refused, and the figure so far."""
    if kind not in get_args(sweeps.SweepKind):
        raise HTTPException(404)
    whatif, _ = _asked(request)
    workers: Workers = request.app.state.workers

    async def lines() -> AsyncIterator[bytes]:
        progress = None
        while progress is None or progress.done < progress.total:
            try:
                progress, figure = await workers.run(
                    "background", sweeps.advance, whatif, kind, progress
                )
            except (Refused, Busy) as error:
                yield _line({"message": error.message})
                return
            said = {"done": progress.done, "total": progress.total, "refused": progress.refused}
            yield _line({"plan": whatif.name(), **said, "figure": figure})

    return StreamingResponse(lines(), media_type="application/x-ndjson")


# -- what they share -------------------------------------------------------------------------------


def _asked(request: Request) -> tuple[WhatIf, WhatIf | None]:
    return parse_query(request.url.query, request.app.state.settings.profiles)


async def _json(request: Request, task: Callable[..., bytes], *given: object) -> Response:
    begin = time.perf_counter()
    content = await _worked_out(request, task, *given)
    spent_ms = 1000 * (time.perf_counter() - begin)
    return Response(
        content,
        media_type="application/json",
        headers={"Server-Timing": f"answer;dur={spent_ms:.1f}"},
    )


async def _worked_out(request: Request, task: Callable[..., T], *given: object) -> T:
    """The result of a task, unless the browser hangs up before."""
    workers: Workers = request.app.state.workers
    work = asyncio.ensure_future(workers.run("front", task, *given))
    gone = asyncio.ensure_future(_gone(request))
    await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if not work.done():
        work.cancel()
        raise HTTPException(_GONE)
    return work.result()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@lru_cache(maxsize=len(_FILES))
def _file(package: str, path: str) -> tuple[bytes, str, str]:
    """Content, entity tag and media type."""
    content = files(package).joinpath(path).read_bytes()
    media_type = f"{_MEDIA_TYPES[path.rpartition('.')[2]]}; charset=utf-8"
    return content, f'"{hashlib.sha256(content).hexdigest()[:20]}"', media_type


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _problem(status: int, message: str, field: str | None = None) -> JSONResponse:
    return JSONResponse({"message": message, "field": field}, status)


def _say_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _problem(_REFUSED, error.message, error.field)


def _say_busy(_: Request, error: Exception) -> Response:
    assert isinstance(error, Busy)
    return _problem(_BUSY, error.message)


def _say_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _problem(error.status_code, str(error.detail))


def _say_bug(_: Request, error: Exception) -> Response:
    """The traceback goes to the terminal of the server."""
    return _problem(500, f"a bug in mhcplan: {type(error).__name__}; its terminal says more")
