"""A picture made again from its receipt, and whether it is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from imaged import receipts
from imaged.aliases import widened
from imaged.errors import BadParameter, ReceiptRefused, StillRunning
from imaged.gateway import body, replies
from imaged.gateway.access import keyed, public
from imaged.gateway.images import understood
from imaged.gateway.state import Gateway
from imaged.gateway.terms import IDEMPOTENCY_KEY, read_terms
from imaged.jobs import State
from imaged.store.keys import Key

FIELD = "receipt"


@public
async def signer(request: Request) -> Response:
    """GET /v1/receipt-key: the public key by which this installation's receipts are known."""
    return JSONResponse({"algorithm": "Ed25519", "key": Gateway.of(request).signer})


@keyed
async def replay(request: Request, gateway: Gateway, key: Key) -> Response:
    """POST /v2/replay: make a receipt's picture again, as a job like any other, and compare."""
    receipt = _read((await body.read(request)).get(FIELD))
    model = await gateway.admission.model(receipt["model"], key)
    ours = receipt["key"] == gateway.signer  # then it was made here, be it under a wider alias
    knobs = widened(model.knobs) if ours else model.knobs
    params, unknown = understood(request, {**receipt["request"], "samples": 1}, knobs)
    if unknown:
        raise BadParameter(FIELD, f"asks for what is not known here: {unknown[0]}")
    terms = read_terms(request.headers)
    if ours:  # nobody else says in which types a checkpoint is to be loaded here
        terms = replace(terms, made_in=receipts.made_in(receipt))
    admitted = await gateway.admission.admit(key, model, params, terms)
    job = await gateway.board.settled(
        key, admitted.job_id, gateway.settings.wait_s, request.receive
    )
    links = gateway.links(request)
    if not job.state.final:
        raise StillRunning(job.id)
    if job.state is not State.COMPLETED:
        return replies.failed(job, links)
    found = replies.result(job, links)[1]
    if "receipt" not in found["images"][0]:
        raise BadParameter(IDEMPOTENCY_KEY, "is of a job from before there were receipts")
    answer = _compared(receipt, found["images"][0], signed_here=ours)
    answer |= {"request_id": job.id, "output": found["output"], "metrics": found["metrics"]}
    made = JSONResponse(answer, headers={"x-request-id": job.id})
    return replies.marked(made, admitted.share, admitted.replayed)


def _read(given: object) -> dict[str, Any]:
    """What can be made again; raises BadParameter."""
    try:
        receipt = receipts.read(given)
    except ReceiptRefused as error:
        raise BadParameter(FIELD, f"cannot be taken: {error.detail}") from error
    if receipt["varied"]:
        raise BadParameter(FIELD, "is of a picture whose request changed on its way")
    return receipt


def _compared(
    receipt: Mapping[str, Any], image: Mapping[str, Any], *, signed_here: bool
) -> dict[str, Any]:
    now = image["receipt"]
    same = receipt["picture"] == now["picture"]
    return {
        "verdict": "identical" if same else "different",
        "signed_here": signed_here,
        "differences": receipts.differences(receipt, now),
        "picture": {"receipt": receipt["picture"], "now": now["picture"]},
        "receipt": now,
    }
