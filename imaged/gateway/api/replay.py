"""Replay: make a receipt's image again, and compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from imaged.catalogue.aliases import widened
from imaged.errors import BadParameter, ReceiptRefused, StillRunning
from imaged.gateway.auth import keyed, public
from imaged.gateway.context import Gateway
from imaged.gateway.present import bodies
from imaged.gateway.present.headers import with_rate_headers
from imaged.gateway.submit import request_body
from imaged.gateway.submit.options import IDEMPOTENCY_KEY, read_options
from imaged.gateway.submit.request_body import parse_params
from imaged.jobs import State
from imaged.provenance import receipts
from imaged.store.accounts.keys import Key

RECEIPT = "receipt"


@public
async def signer(request: Request) -> Response:
    """GET /v1/receipt-key: the public key by which this installation's receipts are known."""
    return JSONResponse({"algorithm": "Ed25519", "key": Gateway.of(request).signer})


@keyed
async def replay(request: Request, gateway: Gateway, key: Key) -> Response:
    """POST /v2/replay: make a receipt's picture again, as a job like any other, and compare."""
    receipt = _read((await request_body.read(request)).get(RECEIPT))
    model = await gateway.admission.model(receipt["model"], key)
    ours = receipt["key"] == gateway.signer  # made here, perhaps under an alias with wider bounds
    knobs = widened(model.knobs) if ours else model.knobs
    params, unknown = parse_params(request, {**receipt["request"], "samples": 1}, knobs)
    if unknown:
        raise BadParameter(RECEIPT, f"asks for what is not known here: {unknown[0]}")
    options = read_options(request.headers)
    if ours:  # other receipts must not choose the dtypes of checkpoints here
        options = replace(options, made_in=receipts.made_in(receipt))
    admitted = await gateway.admission.admit(key, model, params, options)
    job = await gateway.wait_for(request, admitted)
    links = gateway.links(request)
    if not job.state.final:
        raise StillRunning(job.id)
    if job.state is not State.COMPLETED:
        return bodies.failed(job, links)
    found = bodies.result(job, links)[1]
    if "receipt" not in found["images"][0]:
        raise BadParameter(IDEMPOTENCY_KEY, "is of a job from before there were receipts")
    answer = _compared(receipt, found["images"][0], signed_here=ours)
    answer |= {"request_id": job.id, "output": found["output"], "metrics": found["metrics"]}
    made = JSONResponse(answer, headers={"x-request-id": job.id})
    return with_rate_headers(made, admitted.rate, admitted.replayed)


def _read(given: object) -> dict[str, Any]:
    """A receipt that can be replayed; raises BadParameter."""
    try:
        receipt = receipts.read(given)
    except ReceiptRefused as error:
        raise BadParameter(RECEIPT, f"cannot be taken: {error.detail}") from error
    if receipt["varied"]:
        raise BadParameter(RECEIPT, "is of a picture whose request changed on its way")
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
