"""How a request would be understood, what it would cost and when it would be done: without it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from imaged.catalogue import DEFAULT_SLUG, Model, price_micros
from imaged.errors import BadParameter, CheckpointRefused, UnknownModel
from imaged.explain import Explainer, reports, taken, warnings
from imaged.gateway import body, replies
from imaged.gateway.access import keyed, public
from imaged.gateway.drafts import read_draft
from imaged.gateway.forecast import Forecast, forecast
from imaged.gateway.images import understood
from imaged.gateway.quotes import LIFE_S, Quote
from imaged.gateway.state import Gateway
from imaged.jobs import share
from imaged.params import WIDEST, ImageParams, plain
from imaged.schedule import STEPS
from imaged.schedulers import calls_before
from imaged.store import demand
from imaged.store.keys import Key
from imaged.store.pace import pace

HERE = ("READY", "BUSY")


@keyed
async def preflight(request: Request, gateway: Gateway, key: Key) -> Response:
    """POST /v2/{slug}/preflight: how a request would be understood, and a quote for it."""
    model = await gateway.admission.model(request.path_params["slug"], key)
    sent = await body.read(request)
    params, said = understood(request, sent, model.knobs)
    await gateway.admission.check_loras(key, params)
    cost = price_micros(model, params)

    def work() -> tuple[dict[str, Any], Any]:
        if gateway.admission.refused(params):
            said.append("prompt would be refused by the rules of this server")
        told = _told(model, params, gateway.settings.embeddings_folder)
        return told, _expected(gateway, key, model, cost)

    told, (expected, state, free) = await gateway.turns.take(key.id, work)
    now = time.time()
    quote = Quote(key.id, model.slug, params, cost, now + LIFE_S)
    answer = {
        "quote_id": quote.seal(gateway.secret),
        "expires_at": replies.utc(quote.until),
        "model": model.slug,
        "checkpoint": model.checkpoint_name,
        "determinism": gateway.settings.determinism,
        "cost": replies.dollars(cost),
        "unet_calls": params.unet_calls * params.samples,
        **_drafted(read_draft(sent, params.num_inference_steps), params, cost),
        "expected": expected and _rounded(expected),
        "parameters": {name: plain(getattr(params, name)) for name in params.as_dict()},
        "taken": taken(sent, params, model.knobs),
        **told,
        "warnings": [*said, *_of_server(state, cost, free), *told["warnings"]],
    }
    return await asyncio.to_thread(JSONResponse, answer)  # it may be long


@public
async def list_schedulers(request: Request) -> Response:
    """GET /v1/schedulers: where each steps with a model, its settings, its other names."""
    gateway, query = Gateway.of(request), request.query_params
    offered = await gateway.admission.catalogue()
    model = offered.get(query.get("model", DEFAULT_SLUG))
    if model is None:
        raise UnknownModel()
    profile, steps = query.get("profile", "diffusers"), query.get("steps", "25")
    if profile not in STEPS:
        raise BadParameter("profile", "should be one of " + ", ".join(STEPS))
    least, most = WIDEST["num_inference_steps"]
    if not (steps.isascii() and steps.isdigit() and len(steps) < 4 and least <= int(steps) <= most):
        raise BadParameter("steps", f"should be an integer between {least} and {most}")
    try:
        explainer = await asyncio.to_thread(Explainer.of, model.weights)
    except CheckpointRefused as error:
        raise UnknownModel(f"This gateway cannot tell of the model's schedulers: {error}") from None
    content = await asyncio.to_thread(_schedulers, explainer, profile, int(steps))
    return Response(content, media_type="application/json")


@lru_cache(maxsize=64)  # anyone may ask
def _schedulers(explainer: Explainer, profile: str, steps: int) -> bytes:
    found = explainer.schedulers(profile, steps)
    return json.dumps({"profile": profile, "steps": steps, "schedulers": found}).encode()


def _told(model: Model, params: ImageParams, embeddings: Path) -> dict[str, Any]:
    """Reports and schedule, as far as the checkpoint's small files are on this machine."""
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
    """What is made, and owed, of a draft that nobody finishes."""
    if not steps:
        return {}
    calls = calls_before(params.scheduler, steps) * params.samples
    return {
        "draft": {
            "steps": steps,
            "unet_calls": calls,
            "cost": replies.dollars(share(cost, calls, params)),
        }
    }


def _expected(
    gateway: Gateway, key: Key, model: Model, cost: int
) -> tuple[Forecast | None, str, int]:
    """The forecast, the best state of the checkpoint on a worker, and the key's free credits."""
    now, settings = time.time(), gateway.settings
    with gateway.db.read() as connection:
        known = pace(connection, key.id, now, now - settings.lease_s)
        state = demand.states(connection, now - settings.lease_s).get(model.slug, "UNLOADED")
    return forecast(model.slug, cost, known, settings.slots), state, known.free_micros


def _rounded(found: Forecast) -> dict[str, Any]:
    """Seconds to the hundredth."""
    told = asdict(found)
    for name in ("wait", "run"):
        told[f"{name}_s"] = {k: round(v, 2) for k, v in told.pop(name).items()}
    return told


def _of_server(state: str, cost: int, free: int) -> Sequence[str]:
    """What stands in the way at the moment."""
    found = []
    if state not in HERE:
        found.append(
            f"the checkpoint is {state}: the time until it is loaded is not in what is expected"
        )
    if cost > free:
        found.append(
            f"the key has {replies.dollars(free):.6f} credits left, this costs "
            f"{replies.dollars(cost):.6f}"
        )
    return found
