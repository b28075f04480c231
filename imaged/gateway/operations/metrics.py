"""GET /metrics: the queue, the workers and the models, as Prometheus reads them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from imaged.catalogue.model import ModelState
from imaged.gateway.auth import public
from imaged.gateway.context import Gateway
from imaged.store import catalogue
from imaged.store.jobs import model_demand
from imaged.store.sql.database import Database


@public
async def metrics(request: Request) -> Response:
    """GET /metrics: figures for Prometheus; they are of the whole store, not of this process."""
    gateway = Gateway.of(request)
    found = Store(gateway.db, time.time(), gateway.settings.lease_s)
    text = await asyncio.to_thread(generate_latest, found)
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


class Store(Collector):
    """Reads all figures in one transaction."""

    def __init__(self, db: Database, now: float, lease_s: float) -> None:
        self._db, self._now, self._oldest = db, now, now - lease_s

    def collect(self) -> Iterator[Metric]:
        """One family of gauges after the other."""
        with self._db.read() as connection:
            offered = catalogue.catalogue(connection)
            states = model_demand.states(connection, self._oldest)
            counts, since = model_demand.counts(connection)
            alive = model_demand.workers_since(connection, self._oldest)
        yield GaugeMetricFamily("imaged_workers", "Workers that are alive.", value=alive)
        named = GaugeMetricFamily(
            "imaged_jobs", "Jobs that wait or run, by model.", labels=["model", "state"]
        )
        asked = sorted({*offered, *(model for model, _ in counts)})  # or taken off since
        for model in asked:
            for job_state in ("QUEUED", "PROCESSING"):
                named.add_metric([model, job_state], counts.get((model, job_state), 0))
        yield named
        waits = GaugeMetricFamily(
            "imaged_longest_wait_seconds",
            "How long the oldest waiting job has waited, by model.",
            labels=["model"],
        )
        for model in asked:
            waits.add_metric([model], max(0.0, self._now - since.get(model, self._now)))
        yield waits
        held = GaugeMetricFamily(
            "imaged_model_state",
            "1 for the state of a model's checkpoint, the best that a worker says of it.",
            labels=["model", "state"],
        )
        for model in offered:
            for state in ModelState:
                held.add_metric([model, state], states.get(model, ModelState.UNLOADED) is state)
        yield held
