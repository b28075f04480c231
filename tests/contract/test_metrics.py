"""/metrics, read by the parser of the client library that Prometheus itself offers."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from imaged.store.jobs import queue
from tests.contract.gate import PAINTER, Gate


def scraped(gate: Gate) -> dict[str, dict[tuple[str, ...], float]]:
    with gate.client() as client:
        answer = client.get("/metrics", headers={"x-api-key": ""})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            found.setdefault(family.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def test_what_waits_and_what_runs(gate: Gate) -> None:
    """Jobs that the stand-in holds are set aside under a model that nobody offers."""
    aside = "held-by-a-test"
    before = scraped(gate)
    assert before["imaged_workers"][()] >= 1
    assert before["imaged_jobs"][(gate.slug, "QUEUED")] == 0
    was = before["imaged_jobs"].get((aside, "QUEUED"), 0)
    held = [gate.submit("hold") for _ in range(3)]
    time.sleep(0.3)
    after = scraped(gate)
    assert after["imaged_jobs"][(aside, "QUEUED")] == was + 3
    assert after["imaged_longest_wait_seconds"][(aside,)] > 0.1
    with gate.database.write() as c:
        for job_id in held:
            queue.cancel(c, job_id, time.time(), 60.0)


def test_the_states_of_models(gate: Gate) -> None:
    def states() -> list[Any]:
        found = scraped(gate)["imaged_model_state"]
        return [state for (model, state), value in found.items() if model == "micro" and value]

    def beat(**found: str) -> None:
        now = time.time()
        with gate.database.write() as c:
            queue.beat(c, PAINTER, now, now, "grey", {}, found)

    beat(micro="STARTING")
    assert states() == ["STARTING"]
    beat(micro="READY")
    assert states() == ["READY"]
    with gate.client() as client:
        listed = {m["slug"]: m["state"] for m in client.get("/v1/models").json()["models"]}
    assert listed == {gate.slug: "UNLOADED", "micro": "READY"}
    beat()
    assert states() == ["UNLOADED"]
