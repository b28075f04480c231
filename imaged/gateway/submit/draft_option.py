"""The field `draft` of a request: after which step a job rests, to be looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imaged.errors import BadParameter
from imaged.params.knobs import from_form

DRAFT = "draft"


def read_draft(sent: Mapping[str, Any], steps: int) -> int:
    """The step after which the job rests, of `steps`; 0 without a draft. The field is {"steps": N}
    or {"fraction": F}. Raises BadParameter.
    """
    given = sent.get(DRAFT)
    if given is None:
        return 0
    given = from_form(given)
    value = given.get("steps") if isinstance(given, Mapping) and len(given) == 1 else None
    if isinstance(given, Mapping) and set(given) == {"fraction"}:
        fraction = given["fraction"]
        if isinstance(fraction, float) and 0 < fraction < 1:
            value = min(max(1, round(fraction * steps)), steps - 1)
    if (found := whole(value, 1, steps - 1)) is None:
        raise BadParameter(
            DRAFT,
            f'should be {{"steps": N}} with a whole number between 1 and {steps - 1}, or '
            '{"fraction": F} with a number between 0 and 1',
        )
    return found


def refuse_draft(sent: Mapping[str, Any]) -> None:
    """Raises BadParameter if a draft is asked for on a path that answers with finished images."""
    if sent.get(DRAFT) is not None:
        raise BadParameter(DRAFT, "is for POST /v2/{slug}; this path waits for finished pictures")


def whole(value: Any, low: int, high: int) -> int | None:
    """A whole number between these, or None."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if number and low <= value <= high and value == int(value) else None
