"""Models and schedulers on offer."""

from __future__ import annotations

import asyncio
import time
from functools import lru_cache
from typing import Any

from starlette.requests import Request

from imaged.catalogue.model import DEFAULT_SLUG, MICRO, ModelState
from imaged.checkpoint_info.explain import Explainer, Scheduler
from imaged.errors import BadParameter, CheckpointRefused, UnknownModel
from imaged.gateway.auth import public
from imaged.gateway.context import Gateway
from imaged.gateway.present.answer import Answer, Body
from imaged.gateway.present.units import dollars
from imaged.params.image_params import DEFAULTS, plain
from imaged.params.knobs import WIDEST, Knob
from imaged.sampling.schedulers import STEPS
from imaged.store.jobs import model_demand


class Parameter(Body):
    """A parameter that a model takes; allowed: in words."""

    name: str
    type: str
    default: Any
    required: bool
    allowed: str
    description: str


class ModelCard(Body):
    """A model on offer; price in dollars. stand_in: its checkpoint is the small one that is
    shipped.
    """

    slug: str
    aliases: list[str]
    title: str
    description: str
    licence: str
    state: ModelState
    checkpoint: str
    stand_in: bool
    price_1024px_25_steps: float
    parameters: list[Parameter]
    sample: dict[str, Any]


class ModelCards(Body):
    models: list[ModelCard]


class Schedulers(Body):
    """Where each scheduler steps."""

    profile: str
    steps: int
    schedulers: list[Scheduler]


@public
async def list_models(request: Request) -> Answer[ModelCards]:
    """GET /v1/models: what can be asked for, by whose weights, at what price.

    `state`: BUSY, READY, STARTING, UNAVAILABLE or UNLOADED, the best that a worker says of it.
    """
    gateway = Gateway.of(request)
    admission = gateway.admission
    oldest = time.time() - gateway.settings.lease_s
    offered = await admission.catalogue()
    found = await gateway.db.query(lambda c: model_demand.states(c, oldest))
    return Answer(
        ModelCards(
            [
                ModelCard(
                    slug=m.slug,
                    aliases=admission.aliases_of(m.slug),
                    title=m.title,
                    description=m.description,
                    licence=m.licence,
                    state=found.get(m.slug, ModelState.UNLOADED),
                    checkpoint=m.checkpoint_name,
                    stand_in=m.checkpoint == MICRO and m.slug != "micro",
                    price_1024px_25_steps=dollars(m.price_micros),
                    parameters=[_parameter(knob) for knob in m.knobs],
                    sample=dict(m.sample),
                )
                for m in offered.values()
            ]
        )
    )


def _parameter(knob: Knob) -> Parameter:
    default = plain(knob.default)
    return Parameter(knob.name, knob.kind, default, knob.required, knob.allowed, knob.text)


@public
async def list_schedulers(request: Request) -> Answer[Schedulers]:
    """GET /v1/schedulers: where each steps with a model, its settings, its other names."""
    gateway, query = Gateway.of(request), request.query_params
    offered = await gateway.admission.catalogue()
    model = offered.get(query.get("model", DEFAULT_SLUG))
    if model is None:
        raise UnknownModel()
    profile = query.get("profile", DEFAULTS["scheduler_profile"])
    steps = query.get("steps", str(DEFAULTS["num_inference_steps"]))
    if profile not in STEPS:
        raise BadParameter("profile", "should be one of " + ", ".join(STEPS))
    least, most = WIDEST["num_inference_steps"]
    if not (steps.isascii() and steps.isdigit() and len(steps) < 4 and least <= int(steps) <= most):
        raise BadParameter("steps", f"should be an integer between {least} and {most}")
    try:
        explainer = await asyncio.to_thread(Explainer.of, model.weights)
    except CheckpointRefused as error:
        raise UnknownModel(f"This gateway cannot tell of the model's schedulers: {error}") from None
    return Answer(await asyncio.to_thread(_schedulers, explainer, profile, int(steps)))


@lru_cache(maxsize=64)  # the route needs no key
def _schedulers(explainer: Explainer, profile: str, steps: int) -> Schedulers:
    return Schedulers(profile, steps, explainer.schedulers(profile, steps))
