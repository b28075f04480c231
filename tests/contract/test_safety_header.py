"""The header x-safety: which checks there were, of each answer and of the job it is about."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from imaged.store.sql.schema import jobs
from tests.contract.gate import Gate
from tests.contract.hostile_routes import OPENAI, SDAPI
from tests.contract.looker import REFUSED, UNSURE
from tests.contract.outcomes import BLOCKED

RULES = "prompt-rules=hard"
LOOKED, NOBODY = f"{RULES}, image-checker=on", f"{RULES}, image-checker=off"
IN_VAIN = f"{RULES}, image-checker=unavailable"


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    """A gateway whose worker has a checker."""
    data = tmp_path_factory.mktemp("strict") / "data"
    data.mkdir()
    with Gate(data, checker="tests.contract.looker:look").running() as running:
        yield running


def sized(width: int) -> dict[str, object]:
    return {"prompt": "x", "img_width": width, "img_height": 512}


def said(place: Gate, width: int) -> list[str]:
    """By every answer about a job that has ended, as each dialect asks."""
    slug, size = place.slug, f"{width}x512"
    bearer = {"authorization": f"Bearer {place.key}"}
    with place.client() as client:
        job_id = client.post(f"/v2/{slug}", json=sized(width)).json()["request_id"]
        path = f"/v2/requests/{job_id}"
        answers = [client.get(f"{path}/status?wait=20") for _ in range(3)]
        answers += [client.get(p) for p in (f"{path}/status", path, f"/v1/requests/{job_id}")]
        answers += [
            client.post(f"/v1/{slug}", json=sized(width)),
            client.post(f"/v1/{slug}", json={**sized(width), "base64": True}),
            client.post(SDAPI, json={"prompt": "x", "width": width}),
            client.post(OPENAI, json={"prompt": "x", "size": size}, headers=bearer),
        ]
    return [answer.headers["x-safety"] for answer in answers]


def test_a_job_tells_whether_somebody_looked_at_its_pictures(gate: Gate, strict: Gate) -> None:
    assert said(gate, 512) == [NOBODY] * 10
    assert said(strict, 512) == [LOOKED] * 10
    assert said(strict, REFUSED) == [LOOKED] * 10
    assert said(strict, UNSURE) == [IN_VAIN] * 10


def test_until_there_are_pictures_nobody_has_looked(strict: Gate) -> None:
    """Whatever the settings say: at the submit, while it waits, when it failed, elsewhere."""
    with strict.client() as client:
        blocked = client.post(f"/v1/{strict.slug}", json={"prompt": BLOCKED})
        failed = client.post(f"/v1/{strict.slug}", json={"prompt": "fail: no luck"})
        sent = client.post(f"/v2/{strict.slug}", json={"prompt": "run"})
        status, result = (client.get(sent.json()[url]) for url in ("status_url", "response_url"))
        cancelled = client.delete(sent.json()["response_url"])
        others = [client.get("/v1/models"), client.get("/nowhere"), httpx.get(f"{strict.url}/docs")]
    assert blocked.status_code == failed.status_code == 422
    for answer in (blocked, failed, sent, status, result, cancelled, *others):
        assert answer.headers["x-safety"] == RULES


def test_a_job_of_before_says_nothing_of_it(gate: Gate) -> None:
    """What an older worker delivered does not tell."""
    job_id = gate.submit()
    gate.wait_for_end(job_id)
    with gate.database.write() as c:
        found = c.execute(jobs.select().where(jobs.c.id == job_id)).one().result
        older = {name: value for name, value in found.items() if name != "checked"}
        c.execute(jobs.update().where(jobs.c.id == job_id).values(result=older))
    assert gate.wait_for_end(job_id).headers["x-safety"] == RULES
