"""Every way in which a call for a picture can end, once, for whoever may call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import sqlalchemy as sa

from imaged.gateway.submit.admission import Admission
from tests.conftest import SLUG
from tests.contract.gate import Gate

MADE = "a picture"  # what a client says when it could read one
FAULTS = {
    "faulty": RuntimeError("secret words"),
    "unavailable": sa.exc.OperationalError("SELECT secret", {}, Exception()),
}
CLIENTS = ("sdk", "curl", "npm", "mcp")
BLOCKED = "naked child"


@dataclass(frozen=True)
class Outcome:
    """A request, and how it must end: the status, words of its text, its code."""

    name: str
    status: int
    words: str
    code: str = ""
    key: str = "rich"  # of `keys`
    slug: str = SLUG
    body: Mapping[str, Any] = field(default_factory=lambda: {"prompt": "x"})
    verb: str = "POST"
    curl: tuple[str, ...] = ()  # how curl alone can send it
    hasty: bool = False  # from the server that does not wait
    versions: tuple[str, ...] = ("v1", "v2")

    def of(self, client: str) -> tuple[str, ...]:
        """The versions in which this client meets it."""
        if (self.curl and client != "curl") or (client == "npm" and self.verb == "GET"):
            return ()
        return self.versions if client in ("sdk", "curl") else ("v1",)


def failing(prompt: str, words: str, code: str) -> Outcome:
    return Outcome(code, 422, words, code, body={"prompt": prompt})


OUTCOMES = [
    Outcome("made", 200, MADE),
    Outcome(
        "parameter",
        400,
        "scheduler should be one of",
        "bad_parameter",
        body={"prompt": "x", "scheduler": "z"},
    ),
    Outcome(
        "malformed",
        400,
        "one JSON object",
        "malformed_body",
        curl=("-d", "{", "-H", "content-type: application/json"),
    ),
    Outcome("no key", 401, "Missing Authorization or x-api-key", "key_missing", key="none"),
    Outcome("wrong key", 401, "Unauthorized. API key is invalid", "key_invalid", key="wrong"),
    Outcome("forbidden", 403, "may not use this model", "model_forbidden", key="micro"),
    Outcome("unknown model", 404, "no model of this name", "unknown_model", slug="none"),
    Outcome(
        "unknown id",
        404,
        "Request 0 not found",
        "unknown_request",
        "rich",
        "requests/0",
        verb="GET",
    ),
    Outcome("verb", 405, "HTTP method", "wrong_method", verb="GET"),
    Outcome("poor", 406, "credits", "no_credits", key="poor"),
    Outcome("type", 406, "Invalid content type", "wrong_content_type", curl=("-d", "{}")),
    Outcome("retired", 410, f"ask for {SLUG}", "model_retired", slug="sdxl-old"),
    failing("fail: no luck", "no luck", "job_failed"),
    failing(BLOCKED, "content policy", "content_policy"),
    Outcome("too fast", 429, "Too many requests", "too_fast", key="spent"),
    Outcome("fault", 500, "Internal server error", "error", slug="faulty"),
    Outcome("unavailable", 502, "try again", "unavailable", slug="unavailable"),
    Outcome(
        *("late", 504, "still running", "still_running"),
        body={"prompt": "run"},
        hasty=True,
        versions=("v1",),
    ),
]


def keys(gate: Gate) -> dict[str, str]:
    """A key for each kind of caller; "" sends none."""
    spent = gate.make_key(rpm=1)
    with gate.client(spent) as client:
        assert client.post(f"/v2/{gate.slug}", json={"prompt": "x"}).is_success
    return {
        "rich": gate.key,
        "none": "",
        "wrong": "SG_0123456789abcdef",
        "micro": gate.make_key(models=["micro"]),
        "poor": gate.make_key(credits=0.0),
        "spent": spent,
    }


@contextmanager
def faults() -> Iterator[None]:
    """While it lasts, asking for a slug of FAULTS breaks the server, or finds its store away."""
    right = Admission.model

    async def model(self: Admission, slug: str, key: Any) -> Any:
        if slug in FAULTS:
            raise FAULTS[slug]
        return await right(self, slug, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Admission, "model", model)
        yield


@dataclass(frozen=True)
class Seen:
    """What a client could tell of an answer; not every client reads the code."""

    status: int
    text: str
    code: str | None = None


def differing(client: str, seen: Mapping[tuple[str, str], Seen]) -> list[str]:
    """The outcomes that this client did not see as the table says."""
    wrong = []
    for outcome in OUTCOMES:
        for version in outcome.of(client):
            found = seen[outcome.name, version]
            fine = found.status == outcome.status and outcome.words in found.text
            if not fine or found.code not in (None, outcome.code) or "secret" in found.text:
                wrong.append(f"{client}, {outcome.name}, {version}: {found}")
    return wrong
