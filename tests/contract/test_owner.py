"""No route reads a job or anything else of a key without knowing whose it is."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from imaged.gateway import auth
from imaged.gateway.app import ROUTES, read_only
from tests.contract.gate import Gate

#: Everything that needs no key, and why.
PUBLIC = {
    "/livez": "health",
    "/readyz": "health",
    "/metrics": "counts, no keys and no prompts",
    "/v1/health": "health",
    "/v1/models": "catalogue",
    "/v1/schedulers": "catalogue",
    "/v1/receipt-key": "the public half of a key",
    "/inference-model-information/list": "catalogue",
    "/openapi.json": "documentation",
    "/docs": "documentation",
    "/files/{name}": "the link is signed",
}
ROUTED = [route for route in ROUTES if auth.marks(route.endpoint) != ["public"]]


def calls(route: Route) -> list[str]:
    if isinstance(route.endpoint, type):
        return [verb.upper() for verb in auth.VERBS if hasattr(route.endpoint, verb)]
    return sorted((route.methods or set()) - {"HEAD"})


def unmarked() -> list[str]:
    """Routes of which the table does not say who may call them, or says too little."""
    found = []
    for route in ROUTES:
        for mark in auth.marks(route.endpoint):
            fine = mark == ("owner" if "job_id" in route.param_convertors else "key")
            said = mark == "public" and (route.path in PUBLIC or route.endpoint is read_only)
            if not fine and not said:
                found.append(route.path)
    return found


def unexplained(routes: list[Route]) -> list[str]:
    """Paths with a parameter that is neither an owner's job nor harmless for a reason."""
    return [
        route.path
        for route in routes
        if set(route.param_convertors) - {"job_id"} and not auth.UNOWNED_PATH_PARAMS.get(route.path)
    ]


def test_every_parameter_of_a_path_is_an_owners_or_harmless() -> None:
    assert unexplained(ROUTES) == []
    assert set(auth.UNOWNED_PATH_PARAMS) == {r.path for r in ROUTES if r.param_convertors} - {
        path for _, path in job_paths()
    }


@pytest.mark.parametrize(
    "path",
    [
        *("/x/{id}", "/x/{id:int}", "/v2/requests/{request_id}", "/v2/{slug}/jobs/{id}"),
        *("/v1/secrets/{name}", "/v2/requests/{job_id}/{k}", "/x/{job_id:path}", "/x/{job_id}"),
    ],
)
def test_a_key_alone_opens_no_path_with_a_parameter(path: str) -> None:
    @auth.keyed
    async def careless(*_: Any) -> Response:
        return Response()

    with pytest.raises(TypeError, match=r"name its job|make its endpoint"):
        auth.route(path, careless)
    assert unexplained([Route(path, careless)]) == [path] * (
        set(re.findall(r"{(\w+)", path)) != {"job_id"}
    )


def test_an_owner_needs_a_job_in_the_path() -> None:
    @auth.owned
    async def of_no_job(*_: Any) -> Response:
        return Response()

    with pytest.raises(TypeError):
        auth.route("/x", of_no_job)


def test_every_route_says_who_may_call() -> None:
    assert unmarked() == []


def test_a_new_route_without_an_owner_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def careless(_: Request) -> Response:
        return Response()

    for endpoint in (careless, auth.public(careless)):
        with pytest.raises(TypeError, match="make its endpoint by public, keyed or owned"):
            auth.route("/v2/requests/{job_id}/secrets", endpoint)
    with pytest.raises(TypeError):
        auth.route("/v1/secrets", lambda _: Response())
    planted = [*ROUTES, Route("/v1/secrets", careless), Route("/v1/more", auth.public(careless))]
    monkeypatch.setitem(globals(), "ROUTES", planted)
    assert unmarked() == ["/v1/secrets", "/v1/more"]


@pytest.mark.parametrize("route", ROUTED, ids=lambda route: str(route.path))
def test_without_a_key_nothing_is_told(gate: Gate, route: Route) -> None:
    path = re.sub(r"{\w+}", "x", route.path)
    for method in calls(route):
        for headers in ({}, {"x-api-key": "SG_wrong"}):
            answer = httpx.request(method, gate.url + path, headers=headers, json={})
            if auth.marks(route.endpoint) != ["public"]:
                assert answer.status_code == 401, (method, path)


def job_paths() -> list[tuple[str, str]]:
    found = [(m, r.path) for r in ROUTED if "{job_id}" in r.path for m in calls(r)]
    return [*found, ("GET", "/v2/requests/{job_id}/status")]  # in front of the routes


def leaks(gate: Gate, job_id: str, stranger: str) -> list[tuple[str, str]]:
    """Calls by which a stranger hears of the job."""
    with gate.client(stranger) as client:
        return [
            (method, path)
            for method, path in job_paths()
            if client.request(method, path.replace("{job_id}", job_id)).status_code != 404
        ]


def test_a_stranger_hears_nothing_of_a_job(gate: Gate) -> None:
    job_id = gate.submit()
    gate.wait_for_end(job_id)
    assert len(job_paths()) >= 4
    assert leaks(gate, job_id, gate.make_key()) == []


def test_mutant_owner_clause_dropped(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    from imaged.gateway.read.job_reader import JobReader

    async def any_job(self: JobReader, _: Any, job_id: str) -> Any:
        return await self._jobs.get(job_id)

    job_id, stranger = gate.submit(), gate.make_key()
    gate.wait_for_end(job_id)
    monkeypatch.setattr(JobReader, "job", any_job)
    assert len(leaks(gate, job_id, stranger)) == len(job_paths())


# -- links to files ---------------------------------------------------------------------------


def unsigned(gate: Gate) -> list[int]:
    """What links to a picture answer whose signature is missing, wrong or another's."""
    job_id = gate.submit(samples=2)
    gate.wait_for_end(job_id)
    with gate.client() as client:
        images = client.get(f"/v2/requests/{job_id}").json()["images"]
    first, second = (httpx.URL(image["url"]) for image in images)
    changed = [
        first.copy_with(query=None),
        first.copy_merge_params({"sig": "0" * 40}),
        first.copy_merge_params({"exp": str(int(first.params["exp"]) + 1)}),
        second.copy_with(query=first.query),
    ]
    assert httpx.get(first).status_code == 200
    return [httpx.get(url).status_code for url in changed]


def test_unsigned_links_lead_nowhere(gate: Gate) -> None:
    assert unsigned(gate) == [404] * 4


def test_mutant_unsigned_link_accepted(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    from imaged.store import blobs

    monkeypatch.setattr(blobs, "verify", lambda *_: True)
    assert unsigned(gate) == [200] * 4


def test_mutant_failed_as_200(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    from imaged.gateway.present import bodies

    def failed_codes() -> set[int]:
        job_id = gate.submit("fail: no luck")
        gate.wait_for_end(job_id)
        read = [p for method, p in job_paths() if method == "GET" and not p.endswith("/events")]
        paths = [path.replace("{job_id}", job_id) for path in read]
        with gate.client() as client:
            return {client.get(path).status_code for path in paths}

    right = bodies.status
    assert failed_codes() == {422}
    monkeypatch.setattr(bodies, "status", lambda job, links: (200, right(job, links)[1]))
    assert failed_codes() == {200}
