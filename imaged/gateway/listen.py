"""How uvicorn serves the gateway: the edge's protocol, no access log, files for connections."""

from __future__ import annotations

import contextlib
import resource

import uvicorn

from imaged.gateway.app import build_app
from imaged.gateway.edge import Limits, protocol
from imaged.gateway.rules import statement
from imaged.gateway.state import Gateway
from imaged.settings import Settings

SPARE_FILES = 128  # for the store, pictures, pipes


def server(settings: Settings) -> uvicorn.Server:
    """uvicorn's, not yet running; opens the store, and a setting that is wrong ends the start."""
    limits = Limits(
        connections=min(settings.connections, _open_files() - SPARE_FILES),
        per_address=settings.connections_per_address,
    )
    gateway = Gateway.open(settings, stopping=lambda: ready.should_exit)
    config = uvicorn.Config(
        build_app(gateway),
        host=settings.host,
        port=settings.port,
        http=protocol(limits, gateway.kept),
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
        server_header=False,
        headers=[("x-safety", statement(settings))],  # also where no app of ours answers
    )
    ready = uvicorn.Server(config)
    return ready


def _open_files() -> int:
    """Files this process may have open, once it has asked for all it can get."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else hard
    if wanted > soft:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
