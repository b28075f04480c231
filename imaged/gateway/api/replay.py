"""Replay: make a receipt's image again, and compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from imaged.errors import BadParameter, ReceiptRefused
from imaged.gateway.auth import keyed, public
from imaged.gateway.context import Gateway
from imaged.gateway.present import bodies
from imaged.gateway.present.errors import error_response
from imaged.gateway.present.form import Form
from imaged.gateway.present.links import Links
from imaged.gateway.submit import request_body
from imaged.gateway.submit.submission import IDEMPOTENCY_KEY, Asked
from imaged.jobs import Job
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
    ours = receipt["key"] == gateway.signer
    asked = Asked(
        receipt["model"],
        {**receipt["request"], "samples": 1},
        wide=ours,  # it may have been made under an alias with wider bounds
        # Others' receipts must not choose the dtypes of checkpoints here.
        made_in=receipts.made_in(receipt) if ours else None,
    )
    submission = await gateway.admission.submission(key, request.headers, asked)
    if submission.warnings:
        raise BadParameter(RECEIPT, f"asks for what is not known here: {submission.warnings[0]}")
    answer = partial(_answer, receipt, signed_here=ours)
    form = Form(answer, error_response, bodies.failed)
    return await gateway.run(request, key, submission, form)


def _answer(
    receipt: Mapping[str, Any], job: Job, links: Links, _: Sequence[bytes], *, signed_here: bool
) -> Response:
    found = bodies.result(job, links)[1]
    if "receipt" not in found["images"][0]:
        raise BadParameter(IDEMPOTENCY_KEY, "is of a job from before there were receipts")
    answer = _compared(receipt, found["images"][0], signed_here=signed_here)
    answer |= {"request_id": job.id, "output": found["output"], "metrics": found["metrics"]}
    return JSONResponse(answer, headers={"x-request-id": job.id})


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
