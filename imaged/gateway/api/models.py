"""Models and schedulers on offer."""

from __future__ import annotations

import asyncio
import json
import time
from functools import lru_cache
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from imaged.catalogue.model import DEFAULT_SLUG, MICRO, ModelState
from imaged.checkpoint_info.explain import Explainer
from imaged.errors import BadParameter, CheckpointRefused, UnknownModel
from imaged.gateway.auth import public
from imaged.gateway.context import Gateway
from imaged.gateway.present.units import dollars
from imaged.params.image_params import plain
from imaged.params.knobs import WIDEST, Knob
from imaged.sampling.schedulers import STEPS
from imaged.store.jobs import model_demand


@public
async def list_models(request: Request) -> Response:
    """GET /v1/models: what can be asked for, by whose weights, at what price.

    `state`: BUSY, READY, STARTING, UNAVAILABLE or UNLOADED, the best that a worker says of it.
    """
    gateway = Gateway.of(request)
    admission = gateway.admission
    oldest = time.time() - gateway.settings.lease_s
    offered = await admission.catalogue()
    found = await gateway.db.query(lambda c: model_demand.states(c, oldest))
    return JSONResponse(
        {
            "models": [
                {
                    "slug": m.slug,
                    "aliases": admission.aliases_of(m.slug),
                    "title": m.title,
                    "description": m.description,
                    "licence": m.licence,
                    "state": found.get(m.slug, ModelState.UNLOADED),
                    "checkpoint": m.checkpoint_name,
                    "stand_in": m.checkpoint == MICRO and m.slug != "micro",
                    "price_1024px_25_steps": dollars(m.price_micros),
                    "parameters": [_parameter(knob) for knob in m.knobs],
                    "sample": dict(m.sample),
                }
                for m in offered.values()
            ]
        }
    )


def _parameter(knob: Knob) -> dict[str, Any]:
    return {
        "name": knob.name,
        "type": knob.kind,
        "default": plain(knob.default),
        "required": knob.required,
        "allowed": knob.allowed,
        "description": knob.text,
    }


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


@lru_cache(maxsize=64)  # the route needs no key
def _schedulers(explainer: Explainer, profile: str, steps: int) -> bytes:
    found = explainer.schedulers(profile, steps)
    return json.dumps({"profile": profile, "steps": steps, "schedulers": found}).encode()
