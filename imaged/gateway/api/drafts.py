"""Finishing a draft: chosen images of a parked job run to their end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request

from imaged.catalogue.aliases import widened
from imaged.errors import BadParameter, NotParked, UnknownModel
from imaged.gateway.auth import own_job, owned
from imaged.gateway.context import Gateway
from imaged.gateway.present import bodies
from imaged.gateway.present.answer import Answer
from imaged.gateway.present.bodies import JobBody
from imaged.gateway.submit.submission import read_body, whole
from imaged.jobs import Job, State
from imaged.moderation.rules import REFUSAL
from imaged.params.image_params import ImageParams
from imaged.params.knobs import from_form, safe_name
from imaged.store.jobs import drafts

#: Parameters that may change at a draft.
CHANGES = ("prompt", "guidance_scale")


@owned
async def finish(request: Request, gateway: Gateway, job: Job) -> Answer[JobBody]:
    """POST /v2/requests/{id}/finish: the chosen pictures of a parked draft go on to their end."""
    sent = await read_body(request)
    unknown = sorted(set(sent) - {"samples", *CHANGES})
    if unknown:
        raise BadParameter(
            safe_name(unknown[0]),
            "cannot change any more; what may be sent is samples, " + ", ".join(CHANGES),
        )
    samples = _samples(sent.get("samples"), job.params.samples)
    if job.state is not State.PARKED:
        raise NotParked()
    params = await _changed(gateway, job, sent)
    resumed = gateway.writer.write(lambda c: drafts.resume(c, job, samples, params, time.time()))
    if not await resumed:
        raise NotParked()
    after = await own_job(request, gateway)
    return Answer(bodies.status(after, gateway.links(request))[1])


def _samples(given: Any, count: int) -> Sequence[int]:
    """Chosen image indices in order; all if the field is absent."""
    given = from_form(given)
    if given is None:
        return range(count)
    found = [whole(n, 0, count - 1) for n in given] if isinstance(given, list) else []
    chosen = sorted({n for n in found if n is not None})
    if not chosen or len(chosen) < len(found):
        raise BadParameter(
            "samples", f"should be a list of different whole numbers between 0 and {count - 1}"
        )
    return chosen


async def _changed(gateway: Gateway, job: Job, sent: Mapping[str, Any]) -> ImageParams:
    """The request from the draft on; a changed one is judged by the prompt rules again."""
    model = (await gateway.admission.catalogue()).get(job.model)
    if model is None:
        raise UnknownModel()
    given = {
        knob.name: knob.read(sent[knob.name])
        for knob in widened(model.knobs)
        if knob.name in CHANGES and sent.get(knob.name) is not None
    }
    params = replace(job.params, **given)
    if params.all_loras != job.params.all_loras:
        raise BadParameter("prompt", "should name the LoRAs that the draft was made with")
    if not given:
        return params
    if await gateway.cpu_share.run(job.key_id, lambda: gateway.admission.rules.refuses(params)):
        raise BadParameter("prompt", f"is not taken: {REFUSAL}")
    return params
