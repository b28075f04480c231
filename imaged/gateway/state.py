"""What every handler of one gateway process shares."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from imaged import aliases
from imaged.errors import UnknownRequest
from imaged.gateway.admit import Admission
from imaged.gateway.dispatch import Dispatcher
from imaged.gateway.kept import Kept
from imaged.gateway.reach import Reach
from imaged.gateway.replies import Links
from imaged.gateway.rules import Rules
from imaged.gateway.turns import Turns
from imaged.gateway.wait import Board
from imaged.jobs import Job, State
from imaged.receipts import public
from imaged.settings import Settings
from imaged.store import keys
from imaged.store.blobs import Blobs
from imaged.store.db import Database, Watch
from imaged.store.writer import Writer


@dataclass(frozen=True)
class Gateway:
    settings: Settings
    secret: bytes
    db: Database
    kept: Kept
    blobs: Blobs
    writer: Writer
    admission: Admission
    board: Board
    stopping: Callable[[], bool]  # the server waits for open answers to end; so they end soon
    reach: Reach
    dispatcher: Dispatcher
    turns: Turns  # of preflights
    signer: str  # the public key of receipts

    @classmethod
    def open(cls, settings: Settings, stopping: Callable[[], bool] = lambda: False) -> Gateway:
        """Read the rules, open the store; its schema must be current (`Database.migrate`).

        Event streams and waiting calls end when `stopping` says so; a server that has to stop
        waits for them.
        """
        rules, reach = Rules.load(settings.rules), Reach.load(settings.webhook_networks)
        db = Database(settings.database)
        secret = keys.load_secret(settings.data)
        writer, kept = Writer(db), Kept(Watch(db))
        return cls(
            settings,
            secret,
            db,
            kept,
            Blobs(settings.blobs),
            writer,
            Admission(
                db,
                writer,
                secret,
                aliases.load(settings.aliases_file),
                rules,
                settings.retention_s,
                settings.lora_names,
            ),
            Board(db, kept, stopping),
            stopping,
            reach,
            Dispatcher(db, writer, secret, reach, settings.public_url),
            Turns(),
            public(keys.load_signer(settings.data)),
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

    async def files(self, job: Job) -> list[bytes]:
        """The pictures of a job that is COMPLETED; of another, none."""
        if job.state is not State.COMPLETED or job.result is None:
            return []
        names = [image["name"] for image in job.result["images"]]
        files = await asyncio.to_thread(lambda: [self.blobs.read(name) for name in names])
        found = [content for content in files if content is not None]
        if len(found) < len(names):  # it expired a moment ago
            raise UnknownRequest(f"Request {job.id} not found")
        return found

    def close(self) -> None:
        self.reach.close()
        self.writer.close()
        self.db.close()
