"""Preflight, a dry run: validate, tokenize, price, estimate; nothing is queued."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.requests import Request

from imaged.catalogue.model import Model, ModelState
from imaged.checkpoint_info.explain import Explainer, Scheduler, Taken, reports, taken, warnings
from imaged.errors import CheckpointRefused
from imaged.gateway.auth import keyed
from imaged.gateway.context import Gateway
from imaged.gateway.present import bodies
from imaged.gateway.present.answer import UNSET, Answer, Body, UnsetType
from imaged.gateway.present.units import dollars, utc
from imaged.gateway.read.forecast import Forecast, forecast
from imaged.gateway.submit.quotes import LIFE_S, Quote
from imaged.gateway.submit.submission import DRAFT, read_asked, read_submission
from imaged.jobs import price_of_calls
from imaged.params.image_params import ImageParams, plain
from imaged.prompt.report import Reports
from imaged.sampling.schedulers import calls_before
from imaged.store.accounts.keys import Key
from imaged.store.jobs import model_demand
from imaged.store.jobs.workload import pace


class Seconds(Body):
    """The expectation, and the 10th and 90th percentiles."""

    low: float
    expected: float
    high: float


class Expected(Body):
    """When a job would be done; jobs: how many completed ones are behind it."""

    jobs: int
    wait_s: Seconds
    run_s: Seconds


class DraftCost(Body):
    """What a draft takes that is not finished; dollars."""

    steps: int
    unet_calls: int
    cost: float


class Preflight(Body, kw_only=True):
    """How a request would be understood, and a quote for it."""

    quote_id: str
    expires_at: str
    model: str
    checkpoint: str
    determinism: str
    cost: float
    unet_calls: int
    draft: DraftCost | UnsetType = UNSET
    expected: Expected | None
    parameters: bodies.Parameters
    taken: list[Taken]
    scheduler: Scheduler | None
    prompts: Reports | None
    warnings: list[str]


@keyed
async def preflight(request: Request, gateway: Gateway, key: Key) -> Answer[Preflight]:
    """POST /v2/{slug}/preflight: how a request would be understood, and a quote for it."""
    model = await gateway.admission.model(request.path_params["slug"], key)
    asked = await read_asked(request, model, DRAFT)
    no_headers = Headers()  # they say how a job is handled, and there will be none
    submission = read_submission(gateway.secret, key.id, no_headers, asked)
    params, cost = submission.params, submission.cost_micros
    if problem := await gateway.admission.missing_lora(params):
        raise problem
    said = list(submission.warnings)

    def work() -> tuple[_Told, tuple[Forecast | None, ModelState, int]]:
        if gateway.admission.rules.refuses(params):
            said.append("prompt would be refused by the rules of this server")
        told = _told(model, params, gateway.settings.embeddings_folder)
        return told, _expected(gateway, key, model, cost)

    told, (expected, state, free) = await gateway.cpu_share.run(key.id, work)
    now = time.time()
    quote = Quote(key.id, model.slug, params, cost, now + LIFE_S)
    body = Preflight(
        quote_id=quote.seal(gateway.secret),
        expires_at=utc(quote.until),
        model=model.slug,
        checkpoint=model.checkpoint_name,
        determinism=gateway.settings.determinism,
        cost=dollars(cost),
        unet_calls=params.unet_calls * params.samples,
        draft=_draft_cost(submission.draft_steps, params, cost),
        expected=_rounded(expected) if expected else None,
        parameters={name: plain(getattr(params, name)) for name in params.as_dict()},
        taken=taken(asked.fields, params, model.knobs),
        scheduler=told.scheduler,
        prompts=told.prompts,
        warnings=[*said, *_of_server(state, cost, free), *told.warnings],
    )
    return await asyncio.to_thread(Answer, body)  # it may be long


class _Told(NamedTuple):
    scheduler: Scheduler | None
    prompts: Reports | None
    warnings: list[str]


def _told(model: Model, params: ImageParams, embeddings: Path) -> _Told:
    """Prompt reports and schedule, if the checkpoint's small files are on this machine."""
    try:
        explainer = Explainer.of(model.weights, embeddings)
        told = reports(explainer.reader, params)
        scheduler = explainer.scheduler(
            params.scheduler, params.scheduler_profile, params.num_inference_steps
        )
    except CheckpointRefused as error:
        unknown = f"tokens and sigmas are not told: {error}"
        return _Told(None, None, [unknown, *warnings(params, None)])
    return _Told(scheduler, told, warnings(params, told))


def _draft_cost(steps: int, params: ImageParams, cost: int) -> DraftCost | UnsetType:
    if not steps:
        return UNSET
    calls = calls_before(params.scheduler, steps) * params.samples
    return DraftCost(steps, calls, dollars(price_of_calls(cost, calls, params)))


def _expected(
    gateway: Gateway, key: Key, model: Model, cost: int
) -> tuple[Forecast | None, ModelState, int]:
    """Forecast, model state, and free credits of the key in micro-dollars."""
    now, settings = time.time(), gateway.settings
    with gateway.db.read() as connection:
        known = pace(connection, key.id, now, now - settings.lease_s)
        state = model_demand.states(connection, now - settings.lease_s).get(
            model.slug, ModelState.UNLOADED
        )
    return forecast(model.slug, cost, known, settings.slots), state, known.free_micros


def _rounded(found: Forecast) -> Expected:
    wait, run = (
        Seconds(round(given.low, 2), round(given.expected, 2), round(given.high, 2))
        for given in (found.wait, found.run)
    )
    return Expected(found.jobs, wait, run)


def _of_server(state: ModelState, cost: int, free: int) -> Sequence[str]:
    """Warnings about the model's state and the key's credits."""
    found = []
    if not state.loaded:
        found.append(
            f"the checkpoint is {state}: the time until it is loaded is not in what is expected"
        )
    if cost > free:
        found.append(
            f"the key has {dollars(free):.6f} credits left, this costs {dollars(cost):.6f}"
        )
    return found
