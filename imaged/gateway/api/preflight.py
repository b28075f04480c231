"""Preflight, a dry run: validate, tokenize, price, estimate; nothing is queued."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from imaged.catalogue.model import Model, ModelState
from imaged.checkpoint_info.explain import Explainer, reports, taken, warnings
from imaged.errors import CheckpointRefused
from imaged.gateway.auth import keyed
from imaged.gateway.context import Gateway
from imaged.gateway.present.units import dollars, utc
from imaged.gateway.read.forecast import Forecast, forecast
from imaged.gateway.submit.quotes import LIFE_S, Quote
from imaged.gateway.submit.submission import DRAFT, read_asked
from imaged.jobs import price_of_calls
from imaged.params.image_params import ImageParams, plain
from imaged.sampling.schedulers import calls_before
from imaged.store.accounts.keys import Key
from imaged.store.jobs import model_demand
from imaged.store.jobs.workload import pace


@keyed
async def preflight(request: Request, gateway: Gateway, key: Key) -> Response:
    """POST /v2/{slug}/preflight: how a request would be understood, and a quote for it."""
    asked = await read_asked(request, DRAFT)
    submission = await gateway.admission.submission(key, request.headers, asked)
    model, params, cost = submission.model, submission.params, submission.cost_micros
    if problem := await gateway.admission.missing_lora(params):
        raise problem
    said = list(submission.warnings)

    def work() -> tuple[dict[str, Any], Any]:
        if gateway.admission.rules.refuses(params):
            said.append("prompt would be refused by the rules of this server")
        told = _told(model, params, gateway.settings.embeddings_folder)
        return told, _expected(gateway, key, model, cost)

    told, (expected, state, free) = await gateway.cpu_share.run(key.id, work)
    now = time.time()
    quote = Quote(key.id, model.slug, params, cost, now + LIFE_S)
    answer = {
        "quote_id": quote.seal(gateway.secret),
        "expires_at": utc(quote.until),
        "model": model.slug,
        "checkpoint": model.checkpoint_name,
        "determinism": gateway.settings.determinism,
        "cost": dollars(cost),
        "unet_calls": params.unet_calls * params.samples,
        **_drafted(submission.draft_steps, params, cost),
        "expected": expected and _rounded(expected),
        "parameters": {name: plain(getattr(params, name)) for name in params.as_dict()},
        "taken": taken(asked.fields, params, model.knobs),
        **told,
        "warnings": [*said, *_of_server(state, cost, free), *told["warnings"]],
    }
    return await asyncio.to_thread(JSONResponse, answer)  # it may be long


def _told(model: Model, params: ImageParams, embeddings: Path) -> dict[str, Any]:
    """Prompt reports and schedule, if the checkpoint's small files are on this machine."""
    try:
        explainer = Explainer.of(model.weights, embeddings)
        told = reports(explainer.reader, params)
        scheduler = explainer.scheduler(
            params.scheduler, params.scheduler_profile, params.num_inference_steps
        )
    except CheckpointRefused as error:
        unknown = f"tokens and sigmas are not told: {error}"
        return {"scheduler": None, "prompts": None, "warnings": [unknown, *warnings(params, None)]}
    return {"scheduler": scheduler, "prompts": told, "warnings": warnings(params, told)}


def _drafted(steps: int, params: ImageParams, cost: int) -> dict[str, Any]:
    """UNet calls and price of a draft that is not finished."""
    if not steps:
        return {}
    calls = calls_before(params.scheduler, steps) * params.samples
    owed = dollars(price_of_calls(cost, calls, params))
    return {"draft": {"steps": steps, "unet_calls": calls, "cost": owed}}


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


def _rounded(found: Forecast) -> dict[str, Any]:
    """The forecast with rounded seconds."""
    told = asdict(found)
    for name in ("wait", "run"):
        told[f"{name}_s"] = {k: round(v, 2) for k, v in told.pop(name).items()}
    return told


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
