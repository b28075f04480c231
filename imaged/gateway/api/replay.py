"""Replay: make a receipt's image again, and compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from imaged.errors import BadParameter, ReceiptRefused
from imaged.gateway.auth import keyed, public
from imaged.gateway.context import Gateway
from imaged.gateway.present import bodies
from imaged.gateway.present.answer import UNSET, Answer, Body
from imaged.gateway.present.answer_format import AnswerFormat
from imaged.gateway.present.errors import error_response
from imaged.gateway.present.links import Links
from imaged.gateway.submit.submission import IDEMPOTENCY_KEY, Asked, read_body, read_submission
from imaged.gateway.submit_and_wait import submit_and_wait
from imaged.jobs import Job
from imaged.provenance import receipts
from imaged.store.accounts.keys import Key

RECEIPT = "receipt"
Pixels = Annotated[
    dict[str, Any], Meta(extra_json_schema={"required": ["width", "height", "sha256"]})
]


class Signer(Body):
    """A public key, in base64."""

    algorithm: str
    key: str


class Difference(Body):
    """A field in which two receipts differ."""

    field: str
    receipt: Any
    now: Any


class Pictures(Body):
    """Size and SHA-256 of the pixels, then and now."""

    receipt: Pixels
    now: Pixels


class Compared(Body):
    """A picture that was made again, beside its receipt."""

    verdict: Literal["identical", "different"]
    signed_here: bool
    differences: list[Difference]
    picture: Pictures
    receipt: bodies.Receipt
    request_id: str
    output: str
    metrics: bodies.Metrics


@public
async def signer(request: Request) -> Answer[Signer]:
    """GET /v1/receipt-key: the public key by which this installation's receipts are known."""
    return Answer(Signer("Ed25519", Gateway.of(request).signer))


@keyed
async def replay(request: Request, gateway: Gateway, key: Key) -> Answer[Compared] | Response:
    """POST /v2/replay: make a receipt's picture again, as a job like any other, and compare."""
    receipt = _read((await read_body(request)).get(RECEIPT))
    ours = receipt["key"] == gateway.signer
    asked = Asked(
        await gateway.admission.model(receipt["model"], key),
        {**receipt["request"], "samples": 1},
        wide=ours,  # it may have been made under an alias with wider bounds
        # Others' receipts must not choose the dtypes of checkpoints here.
        made_in=receipts.made_in(receipt) if ours else None,
    )
    submission = read_submission(gateway.secret, key.id, request.headers, asked)
    if submission.warnings:
        raise BadParameter(RECEIPT, f"asks for what is not known here: {submission.warnings[0]}")
    answer = partial(_answer, receipt, signed_here=ours)
    how = AnswerFormat(answer, error_response, bodies.failed, shows_files=False)
    return await submit_and_wait(request, gateway, key, submission, how)


def _answer(
    receipt: Mapping[str, Any], job: Job, links: Links, _: Sequence[bytes], *, signed_here: bool
) -> Answer[Compared]:
    """Made here again, beside the receipt."""
    found = bodies.completed(job, links)
    now = found.images[0].receipt
    if now is UNSET:
        raise BadParameter(IDEMPOTENCY_KEY, "is of a job from before there were receipts")
    body = Compared(
        "identical" if receipt["picture"] == now["picture"] else "different",
        signed_here,
        [Difference(**one) for one in receipts.differences(receipt, now)],
        Pictures(receipt["picture"], now["picture"]),
        now,
        job.id,
        found.output,
        found.metrics,
    )
    return Answer(body, headers={"x-request-id": job.id})


def _read(given: object) -> dict[str, Any]:
    """A receipt that can be replayed; raises BadParameter."""
    try:
        receipt = receipts.read(given)
    except ReceiptRefused as error:
        raise BadParameter(RECEIPT, f"cannot be taken: {error.detail}") from error
    if receipt["varied"]:
        raise BadParameter(RECEIPT, "is of a picture whose request changed on its way")
    return receipt
