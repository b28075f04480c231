"""uvicorn with our protocol class, sockets bound beforehand, and file limits raised."""

from __future__ import annotations

import contextlib
import errno
import resource
import socket

import uvicorn

from imaged.errors import CommandError
from imaged.gateway.app import build_app
from imaged.gateway.context import Gateway
from imaged.gateway.transport.connections import Limits
from imaged.gateway.transport.protocol import protocol
from imaged.moderation.rules import statement
from imaged.settings import Settings

SPARE_FILES = 128  # descriptors for the store, image files, pipes
BACKLOG = 2048  # of listening sockets, uvicorn's own value


def server(settings: Settings) -> uvicorn.Server:
    """A server that does not run yet; opens the store. Raises CommandError for wrong settings."""
    limits = Limits(
        connections=min(settings.connections, _open_files() - SPARE_FILES),
        per_address=settings.connections_per_address,
    )
    gateway = Gateway.open(settings, stopping=lambda: ready.should_exit)
    config = uvicorn.Config(
        build_app(gateway),
        host=settings.host,
        port=settings.port,
        http=protocol(limits, gateway.cache),
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
        server_header=False,
        headers=[("x-safety", statement(settings))],  # also on answers that uvicorn makes itself
    )
    ready = uvicorn.Server(config)
    return ready


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets, one for each address of `host`; raises CommandError.

    Clients that connect before the server runs wait in the backlog.
    """
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError):
        raise CommandError(f"the host {host} has no address; choose another with --host") from None
    bound: list[socket.socket] = []
    missing: OSError | None = None
    for family, *_, address in dict.fromkeys(found):
        try:
            bound.append(socket.create_server(address, family=family, backlog=BACKLOG))
            bound[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise CommandError(_unbound(error, host, port)) from None
            missing = error  # a machine without IPv6 has a name for it nevertheless
    if not bound:
        assert missing is not None
        raise CommandError(_unbound(missing, host, port))
    return bound


def _unbound(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use: stop what uses it, or choose another with --port"
    if error.errno == errno.EACCES:
        return f"port {port} needs more rights than this user has: choose one from 1024 on, --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine; choose one with --host"
    return f"port {port} of {host} cannot be listened on: {error.strerror}"


def _open_files() -> int:
    """The limit of open files, after raising it to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else hard
    if wanted > soft:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
