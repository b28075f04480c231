"""The vendor's webhook endpoints, under our own origin at the same paths.

The original's answers are not published; these have its field names and no more than is needed.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import msgspec
from starlette.requests import Request

from imaged.errors import BadParameter, UnknownWebhook
from imaged.gateway.auth import keyed
from imaged.gateway.context import Gateway
from imaged.gateway.present.answer import Answer, Body
from imaged.gateway.present.units import utc
from imaged.gateway.submit.submission import read_object
from imaged.store.accounts.keys import Key
from imaged.store.webhooks import subscriptions
from imaged.store.webhooks.subscriptions import TYPES, Event, Webhook

Dispatch = Literal["PENDING", "DELIVERED", "FAILED"]
DISPATCH: dict[str, Dispatch] = {
    "WAITING": "PENDING",
    "DELIVERED": "DELIVERED",
    "DEAD": "FAILED",
}


class Types(Body):
    types: list[str]


class WebhookBody(Body):
    """A webhook."""

    webhook_id: str
    webhook_url: str
    event: Types
    is_active: bool
    created_at: str


class NewWebhook(WebhookBody):
    """A webhook that was just added, with the secret by which its messages are signed."""

    secret: str


class WebhookList(Body):
    webhooks: list[WebhookBody]


class Deactivated(Body):
    webhook_id: str
    is_active: bool


class Sent(Body):
    """One message of a webhook; event_id is sent as webhook-id with every attempt."""

    event_id: str
    request_id: str
    type: str
    status: Dispatch
    attempts: int
    response_status: int | None
    error: str | None
    created_at: str
    next_attempt_at: str | None


class DispatchLog(Body):
    webhook_id: str
    logs: list[Sent]


@keyed
async def listing(request: Request, gateway: Gateway, key: Key) -> Answer[WebhookList]:
    """GET /webhook/get: the key's webhooks."""
    mine = await gateway.db.query(lambda c: subscriptions.of_key(c, key.id))
    return Answer(WebhookList([shown(webhook) for webhook in mine]))


@keyed
async def add(request: Request, gateway: Gateway, key: Key) -> Answer[NewWebhook]:
    """POST /webhook/add: a new webhook; this answer alone shows its secret."""
    url, types, _ = await _subscription(request, gateway)
    webhook = await gateway.writer.write(
        lambda c: subscriptions.add(c, key.id, url, types, time.time())
    )
    secret = subscriptions.secret_of(gateway.secret, webhook.id)
    return Answer(NewWebhook(**msgspec.structs.asdict(shown(webhook)), secret=secret))


@keyed
async def update(request: Request, gateway: Gateway, key: Key) -> Answer[WebhookBody]:
    """POST /webhook/update: another URL or other events for a webhook."""
    url, types, body = await _subscription(request, gateway)
    webhook_id = _id(body.get("webhook_id"))
    changed = await gateway.writer.write(
        lambda c: subscriptions.update(c, key.id, webhook_id, url, types)
    )
    return Answer(shown(changed))


@keyed
async def inactive(request: Request, gateway: Gateway, key: Key) -> Answer[Deactivated]:
    """GET /webhook/inactive?webhook_id=: the vendor's way to delete one."""
    webhook_id = _id(request.query_params.get("webhook_id"))
    await gateway.writer.write(
        lambda c: subscriptions.deactivate(c, key.id, webhook_id, time.time())
    )
    return Answer(Deactivated(webhook_id, is_active=False))


@keyed
async def dispatch_logs(request: Request, gateway: Gateway, key: Key) -> Answer[DispatchLog]:
    """GET /webhook/dispatch-logs?webhook_id=: the newest hundred, for a week."""
    webhook_id = _id(request.query_params.get("webhook_id"))
    log = await gateway.db.query(lambda c: subscriptions.log_of(c, key.id, webhook_id))
    return Answer(DispatchLog(webhook_id, [logged(event) for event in log]))


def shown(webhook: Webhook) -> WebhookBody:
    return WebhookBody(
        webhook.id,
        webhook.url,
        Types(list(webhook.types)),
        is_active=webhook.disabled_at is None,
        created_at=utc(webhook.created_at),
    )


def logged(event: Event) -> Sent:
    return Sent(
        event_id=event.id,
        request_id=event.job_id,
        type=event.type,
        status=DISPATCH[event.state],
        attempts=event.attempts,
        response_status=event.status,
        error=event.problem,
        created_at=utc(event.created_at),
        next_attempt_at=utc(event.due_at) if event.state == "WAITING" else None,
    )


async def _subscription(
    request: Request, gateway: Gateway
) -> tuple[str, list[str], dict[str, Any]]:
    """URL, event types and the whole body; raises BadParameter."""
    body = await read_object(request)
    url = str(gateway.url_guard.check(body.get("webhook_url")))
    event = body.get("event")
    types = event.get("types") if isinstance(event, dict) else None
    if not isinstance(types, list) or not types or any(t not in TYPES for t in types):
        raise BadParameter("event.types", f"should be a list of one or more of {', '.join(TYPES)}")
    return url, sorted(set(types)), body


def _id(given: Any) -> str:
    if not isinstance(given, str):
        raise BadParameter("webhook_id", "is mandatory and should be a string")
    if not given.isascii() or len(given) > 64 or "\0" in given:
        raise UnknownWebhook()
    return given
