"""What every handler of one gateway process shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from imaged.gateway.admit import Admission
from imaged.gateway.dispatch import Dispatcher
from imaged.gateway.reach import Reach
from imaged.gateway.replies import Links
from imaged.gateway.rules import Rules
from imaged.gateway.wait import Board
from imaged.settings import Settings
from imaged.store import keys
from imaged.store.blobs import Blobs
from imaged.store.db import Database
from imaged.store.writer import Writer


@dataclass(frozen=True)
class Gateway:
    settings: Settings
    secret: bytes
    db: Database
    blobs: Blobs
    writer: Writer
    admission: Admission
    board: Board
    stopping: Callable[[], bool]  # the server waits for open answers to end
    reach: Reach
    dispatcher: Dispatcher

    @classmethod
    def open(cls, settings: Settings, stopping: Callable[[], bool]) -> Gateway:
        """Read the rules, open the store; its schema must be current (`Database.migrate`)."""
        rules, reach = Rules.load(settings.rules), Reach.load(settings.webhook_networks)
        db = Database(settings.database)
        secret = keys.load_secret(settings.data)
        writer = Writer(db)
        return cls(
            settings,
            secret,
            db,
            Blobs(settings.blobs),
            writer,
            Admission(db, writer, secret, rules, settings.retention_s),
            Board(db),
            stopping,
            reach,
            Dispatcher(db, writer, secret, reach, settings.public_url),
        )

    @classmethod
    def of(cls, request: HTTPConnection) -> Gateway:
        gateway = request.app.state.gateway
        assert isinstance(gateway, cls)
        return gateway

    def links(self, request: HTTPConnection) -> Links:
        """URLs under the configured public address, else under the request's own origin."""
        origin = self.settings.public_url or f"{request.url.scheme}://{request.url.netloc}"
        return Links(origin.rstrip("/"), self.secret)

    def close(self) -> None:
        self.reach.close()
        self.writer.close()
        self.db.close()
