"""The objects that all handlers of a gateway process share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from imaged.catalogue import aliases
from imaged.errors import UnknownRequest
from imaged.gateway.present.links import Links
from imaged.gateway.read.job_reader import JobReader
from imaged.gateway.submit.admission import Admission
from imaged.gateway.submit.cpu_share import CpuShare
from imaged.gateway.transport.response_cache import ResponseCache
from imaged.gateway.webhooks.delivery import WebhookDelivery
from imaged.gateway.webhooks.url_guard import UrlGuard
from imaged.jobs import Job, State
from imaged.moderation.rules import Rules
from imaged.provenance.receipts import public
from imaged.settings import Settings
from imaged.store.accounts import keys
from imaged.store.blobs import Blobs
from imaged.store.sql.database import Database, Watch
from imaged.store.sql.group_commit import Writer


@dataclass(frozen=True)
class Gateway:
    settings: Settings
    secret: bytes
    db: Database
    cache: ResponseCache
    blobs: Blobs
    writer: Writer
    admission: Admission
    reader: JobReader
    stopping: Callable[[], bool]  # true once the server shuts down: long answers then end
    url_guard: UrlGuard
    webhook_delivery: WebhookDelivery
    cpu_share: CpuShare  # limits preflights
    signer: str  # public key of receipts, base64

    @classmethod
    def open(cls, settings: Settings, stopping: Callable[[], bool] = lambda: False) -> Gateway:
        """Read the rules, open the store; its schema must be current (`Database.migrate`).

        Event streams and waiting calls end when `stopping` says so; a server that has to stop
        waits for them.
        """
        rules, url_guard = Rules.load(settings.rules), UrlGuard.load(settings.webhook_networks)
        db = Database(settings.database)
        secret = keys.load_secret(settings.data)
        writer, cache = Writer(db), ResponseCache(Watch(db))
        return cls(
            settings,
            secret,
            db,
            cache,
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
            JobReader(db, cache, stopping),
            stopping,
            url_guard,
            WebhookDelivery(db, writer, secret, url_guard, settings.public_url),
            CpuShare(),
            public(keys.load_signer(settings.data)),
        )

    @classmethod
    def of(cls, request: HTTPConnection) -> Gateway:
        gateway = request.app.state.gateway
        assert isinstance(gateway, cls)
        return gateway

    def links(self, request: HTTPConnection) -> Links:
        """Absolute URLs under IMAGED_PUBLIC_URL, else under the request's own origin."""
        origin = self.settings.public_url or f"{request.url.scheme}://{request.url.netloc}"
        return Links(origin.rstrip("/"), self.secret)

    async def files(self, job: Job) -> list[bytes]:
        """The image files of a COMPLETED job, else none; raises UnknownRequest once they
        are deleted.
        """
        if job.state is not State.COMPLETED or job.result is None:
            return []
        names = [image["name"] for image in job.result["images"]]
        files = await asyncio.to_thread(lambda: [self.blobs.read(name) for name in names])
        found = [content for content in files if content is not None]
        if len(found) < len(names):  # it expired a moment ago
            raise UnknownRequest(f"Request {job.id} not found")
        return found

    def close(self) -> None:
        self.url_guard.close()
        self.writer.close()
        self.db.close()
