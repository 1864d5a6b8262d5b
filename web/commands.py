"""The command ``mhcplan web``: check what is given, take a port, open the browser, serve."""

from __future__ import annotations

import socket
import threading
import webbrowser
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from mhcplan.planner.cli.flags import PlanFlags
from mhcplan.planner.cli.predict import Source
from mhcplan.planner.cli.terminal import note
from mhcplan.planner.output import OutputError
from mhcplan.profiles.store import find_profile, profile_names
from mhcplan.web.whatif import WhatIf, whatif_of

_PATIENCE_SECONDS = 2  # with what is still being sent when the server ends
_PORT = 8642  # taken where nothing else was asked for, and another one where it is in use


def web(
    source: Source = "mhc-27b",
    /,
    *,
    flags: PlanFlags | None = None,
    host: str = "127.0.0.1",
    port: Annotated[int | None, Parameter(validator=Number(gte=0, lt=1 << 16))] = None,
    open_browser: Annotated[bool, Parameter(name="--open")] = True,
    profiles: Annotated[list[Path] | None, Parameter(consume_multiple=True, negative=())] = None,
    limit_seconds: Annotated[float, Parameter(validator=Number(gt=0))] = 30,
) -> None:
    """Open the what-if page: sliders, and the answer as they move. Works offline; Ctrl-C ends it.

    mhcplan web
    mhcplan web mhc-9b --pp 4 --microbatches 32
    mhcplan web plan.toml --profiles mine.json

    Args:
        source: a model preset, or a plan file (.toml), that the page starts from
        flags: what to change in it
        host: address to serve at; anything but this machine's own lets others simulate here
        port: port to serve at; without it 8642, or any free one
        open_browser: open the page in a browser
        profiles: profile files that the page offers beside the shipped ones
        limit_seconds: longest that one simulation may take
    """
    # the extra web: needed when the command runs, not when help or completion list it
    import uvicorn

    from mhcplan.web.server import LOOPBACK_HOSTS, Settings, create_app

    plan = (flags or PlanFlags()).plan(source)
    names = list(dict.fromkeys([*profile_names(), plan.profile, *map(str, profiles or ())]))
    for name in names:
        find_profile(name)  # a broken file is said now, not in the page
    whatif = whatif_of(plan)
    whatif.plan()  # too large a step too
    with _listening(host, port) as listener:
        address = _address(listener, whatif)
        note(f"the page is at {address} until Ctrl-C")
        hosts = LOOPBACK_HOSTS
        if not _is_loopback(listener):
            hosts = ("*",)
            note("whoever reaches this address can simulate here")
        if open_browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        settings = Settings(tuple(names), hosts, limit_seconds)
        config = uvicorn.Config(
            create_app(settings),
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_PATIENCE_SECONDS,
        )
        with suppress(KeyboardInterrupt):  # how one ends it
            uvicorn.Server(config).run(sockets=[listener])


def _listening(host: str, port: int | None) -> socket.socket:
    """A socket that listens.

    Raises:
        OutputError: no such host, or the port is in use or not ours to take.
    """
    try:
        return _bound(host, _PORT if port is None else port)
    except OSError as error:
        asked = f"--port {port} of {host}"
        if port is None:
            with suppress(OSError):
                return _bound(host, 0)
            asked = f"--host {host}"  # no port of it is ours to take
        raise OutputError(f"{asked}: {error.strerror}; choose another") from None


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _is_loopback(listener: socket.socket) -> bool:
    return ip_address(listener.getsockname()[0]).is_loopback


def _address(listener: socket.socket, whatif: WhatIf) -> str:
    host, port = listener.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/?{whatif.query()}"
