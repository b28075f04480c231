"""The catalogue, the requests made so far and the account, under the vendor's names."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import httpx

from imaged.client import calls


class Group:
    """Calls that belong together; `http` has the server's address and the key."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def _get(self, path: str, **query: Any) -> dict[str, Any]:
        given = {name: value for name, value in query.items() if value is not None}
        return calls.read(self._http.get(path, params=given))


class Models(Group):
    def list(self) -> dict[str, Any]:
        """Every model with its parameters."""
        return self._get("/inference-model-information/list")


class Generations(Group):
    """This key's own requests. Dates are YYYY-MM-DD, in UTC."""

    def recent(self, model_name: str) -> dict[str, Any]:
        """The newest pictures of a model."""
        return self._get("/inference-request/recent-generations", model_name=model_name)

    def list(
        self,
        page: int = 1,
        model_name: str | None = None,
        start_date: str | None = None,
        end_date: str | None = None,
    ) -> dict[str, Any]:
        """Pictures, newest first."""
        return self._get(
            "/inference-request/generations",
            page=page,
            model_name=model_name,
            start_date=start_date,
            end_date=end_date,
        )

    def history(self, page: int = 1, per_page: int = 20, **search: str | None) -> dict[str, Any]:
        """Requests, the failed and open ones too.

        `search`: from_date, to_date, model_name (a part of it), status (COMPLETED, FAILED,
        PENDING), sort_by (model_created, model_name, credits_deduction), sort_order.
        """
        path = "/inference-request/request-history"
        return self._get(path, page=page, per_page=per_page, **search)

    def get(self, request_id: str) -> dict[str, Any]:
        """One request by its id."""
        return self._get(f"/inference-request/request-history/{quote(request_id, safe='')}")


class Accounts(Group):
    def current(self) -> dict[str, Any]:
        """Who the key is and what it has left."""
        return self._get("/api/auth/authenticate")
