"""Every error raised on purpose, as one tree.

ImagedError
├── Refused                  the request never became a job; nothing was charged
│   ├── MalformedBody   400      ├── KeyMissing      401      ├── WrongContentType 406
│   ├── BadParameter    400      ├── KeyInvalid      401      ├── NoCredits        406
│   ├── UnknownModel    404      ├── UnknownRequest  404      ├── BodyTooLarge     413
│   ├── UnknownPath     404      ├── WrongMethod     405      ├── BodyTooSlow      408
│   ├── ModelForbidden  403      ├── ModelRetired    410      ├── HeadersTooLarge  431
│   ├── TooFast         429      ├── UnknownWebhook  404      ├── TooManyWebhooks  409
│   ├── IdempotencyMismatch 409  └── NotParked       409
│   └── Unavailable     502, 504 (StillRunning): come back later
├── JobFailed           422  the job ran and ended without a picture; free (see transitions.end)
├── CheckpointRefused        a checkpoint that cannot be served, and why
├── SnapshotRefused             a parked picture that cannot go on here, and why
├── ReceiptRefused           what is no receipt, or not as it was signed
├── CommandError             the command line asked for something that cannot be done
├── BadAddress               client side: the server's address, or what is asked of it, is no URL
├── NoAnswer                 client side: the server was not reached, or its answer was lost
├── InferenceFailed          client side: the server reported FAILED
└── InferenceTimeout         client side: waiting ended before the job did

A class knows its machine-readable `code` and HTTP `status`; the text is what people read. No
text repeats what the caller sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


class ImagedError(Exception):
    """Something went wrong that the caller should hear about."""

    code = "error"
    status: int | None = 500

    def __init__(self, detail: str | None = None, *, status: int | None = None) -> None:
        self.detail = detail or (self.__doc__ or "").strip()
        if status is not None:
            self.status = status
        super().__init__(self.detail)


class Refused(ImagedError):
    """The request was refused."""

    code, status = "refused", 400


class MalformedBody(Refused):
    """The body must be one JSON object."""

    code = "malformed_body"


class BadParameter(Refused):
    """A parameter has a value that is not allowed."""

    code = "bad_parameter"

    def __init__(self, field: str, problem: str) -> None:
        self.field = field
        super().__init__(f"{field} {problem}")


class KeyMissing(Refused):
    """Missing Authorization or x-api-key in header"""

    code, status = "key_missing", 401


class KeyInvalid(Refused):
    """Unauthorized. API key is invalid or may have expired. Create one with: imaged keys create"""

    code, status = "key_invalid", 401


class UnknownModel(Refused):
    """There is no model of this name here; GET /v1/models lists them."""

    code, status = "unknown_model", 404


class ModelForbidden(Refused):
    """This key may not use this model."""

    code, status = "model_forbidden", 403


class ModelRetired(Refused):
    """This model is not served any more."""

    code, status = "model_retired", 410


class UnknownRequest(Refused):
    """Request not found"""

    code, status = "unknown_request", 404


class UnknownPath(Refused):
    """There is nothing at this path."""

    code, status = "unknown_path", 404


class WrongMethod(Refused):
    """This path does not take this HTTP method."""

    code, status = "wrong_method", 405


class BodyTooSlow(Refused):
    """The body did not arrive in time."""

    code, status = "body_too_slow", 408


class WrongContentType(Refused):
    """Invalid content type: send application/json or multipart/form-data"""

    code, status = "wrong_content_type", 406


class NoCredits(Refused):
    """Not enough credits."""

    code, status = "no_credits", 406


class BodyTooLarge(Refused):
    """The body is larger than this server accepts."""

    code, status = "body_too_large", 413


class HeadersTooLarge(Refused):
    """The headers are larger than this server accepts."""

    code, status = "headers_too_large", 431


class IdempotencyMismatch(Refused):
    """Idempotency-Key was used for another request: send a new key with a new request.

    409 and not the 422 of the header's IETF draft, because here 422 means that a job ran and
    failed.
    """

    code, status = "idempotency_mismatch", 409

    def __init__(self) -> None:
        super().__init__("Idempotency-Key was used for another request: a new one needs a new key")


class UnknownWebhook(Refused):
    """This key has no webhook of this id."""

    code, status = "unknown_webhook", 404


class TooManyWebhooks(Refused):
    """This key has as many webhooks as it may have."""

    code, status = "too_many_webhooks", 409


class TooFast(Refused):
    """This key has used its share of requests; `reset_at` says when the next one may come."""

    code, status = "too_fast", 429

    def __init__(self, reset_in_s: float, now: float) -> None:
        self.reset_in_s, self.reset_at = reset_in_s, now + reset_in_s
        super().__init__(f"Too many requests: try again in {reset_in_s:.1f} s")


class NotParked(Refused):
    """This job is not a draft that rests: nothing of it can be finished."""

    code, status = "not_parked", 409


class Unavailable(Refused):
    """The server cannot take this request at the moment; try again."""

    code, status = "unavailable", 502  # the original's number for it, not 503


class StillRunning(Unavailable):
    """The job is still running; fetch it later under its request_id."""

    code, status = "still_running", 504

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        super().__init__()


class JobFailed(ImagedError):
    """The job failed; `headers` say of it what an answer's headers say of a job."""

    code, status = "job_failed", 422

    def __init__(
        self, reason: str, detail: str, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__(detail)
        self.code, self.headers = reason, headers


class CheckpointRefused(ImagedError):
    """This checkpoint cannot be served."""

    code = "checkpoint_refused"


class SnapshotRefused(ImagedError):
    """This picture cannot go on from where it was parked."""

    code = "state_refused"


class ReceiptRefused(ImagedError):
    """This is no receipt of a picture."""

    code = "receipt_refused"


class CommandError(ImagedError):
    """The command cannot be carried out."""

    code = "command"


class BadAddress(ImagedError):
    """This is no URL of a server."""

    code, status = "bad_address", None


class NoAnswer(ImagedError):
    """The server was not reached, or its answer was lost; what was asked may have been done."""

    code, status = "no_answer", None


class InferenceFailed(ImagedError):
    """The job failed on the server; `status_body` holds what the server said."""

    code = "inference_failed"

    def __init__(self, detail: str | None, status_body: dict[str, Any]) -> None:
        super().__init__(detail or "the job failed")
        self.status, self.status_body = None, status_body


class InferenceTimeout(ImagedError):
    """Waiting for the job ended before the job did; it may still be running."""

    code = "inference_timeout"

    def __init__(self, request_id: str, elapsed_s: float) -> None:
        super().__init__(f"request {request_id} did not complete within {elapsed_s:.1f} s")
        self.status, self.request_id, self.elapsed_s = None, request_id, elapsed_s
