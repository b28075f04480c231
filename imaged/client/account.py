"""The catalogue, the requests made so far, the account and its webhooks, under the vendor's names.

Both clients have these groups: `Answer` is the body of an answer, or what the asynchronous client
awaits to get it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar
from urllib.parse import quote

Answer = TypeVar("Answer")


class Group(Generic[Answer]):
    """Calls that belong together; `ask` sends one to the client's server, under its key."""

    def __init__(self, ask: Callable[..., Answer]) -> None:
        self._ask = ask

    def _get(self, path: str, **query: Any) -> Answer:
        given = {name: value for name, value in query.items() if value is not None}
        return self._ask("GET", path, params=given)


class Models(Group[Answer]):
    def list(self) -> Answer:
        """Every model with its parameters."""
        return self._get("/inference-model-information/list")


class Generations(Group[Answer]):
    """This key's own requests. Dates are YYYY-MM-DD, in UTC."""

    def recent(self, model_name: str) -> Answer:
        """The newest pictures of a model."""
        return self._get("/inference-request/recent-generations", model_name=model_name)

    def list(
        self,
        page: int = 1,
        model_name: str | None = None,
        start_date: str | None = None,
        end_date: str | None = None,
    ) -> Answer:
        """Pictures, newest first."""
        return self._get(
            "/inference-request/generations",
            page=page,
            model_name=model_name,
            start_date=start_date,
            end_date=end_date,
        )

    def history(self, page: int = 1, per_page: int = 20, **search: str | None) -> Answer:
        """Requests, the failed and open ones too.

        `search`: from_date, to_date, model_name (a part of it), status (COMPLETED, FAILED,
        PENDING), sort_by (model_created, model_name, credits_deduction), sort_order.
        """
        path = "/inference-request/request-history"
        return self._get(path, page=page, per_page=per_page, **search)

    def get(self, request_id: str) -> Answer:
        """One request by its id."""
        return self._get(f"/inference-request/request-history/{quote(request_id, safe='')}")


class Accounts(Group[Answer]):
    def current(self) -> Answer:
        """Who the key is and what it has left."""
        return self._get("/api/auth/authenticate")


class Webhooks(Group[Answer]):
    """Who is told of this key's jobs; the events and their signature: docs/webhooks.md."""

    def get(self) -> Answer:
        """This key's webhooks."""
        return self._get("/webhook/get")

    def add(self, webhook_url: str, event_types: list[str]) -> Answer:
        """A new webhook; only this answer holds its `secret`."""
        return self._ask("POST", "/webhook/add", json=_hook(webhook_url, event_types))

    def update(self, webhook_id: str, webhook_url: str, event_types: list[str]) -> Answer:
        """Another URL and other events."""
        body = {"webhook_id": webhook_id, **_hook(webhook_url, event_types)}
        return self._ask("POST", "/webhook/update", json=body)

    def delete(self, webhook_id: str) -> Answer:
        """Tell it nothing more."""
        return self._get("/webhook/inactive", webhook_id=webhook_id)

    def logs(self, webhook_id: str) -> Answer:
        """What it was told lately, and how it answered."""
        return self._get("/webhook/dispatch-logs", webhook_id=webhook_id)


class Account(Generic[Answer]):
    """The groups that both clients have."""

    def __init__(self, ask: Callable[..., Answer]) -> None:
        self.models = Models(ask)
        self.generations = Generations(ask)
        self.accounts = Accounts(ask)
        self.webhooks = Webhooks(ask)


def _hook(webhook_url: str, event_types: list[str]) -> dict[str, Any]:
    return {"webhook_url": webhook_url, "event": {"types": event_types}}
