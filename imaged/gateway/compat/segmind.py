"""Routes of the vendor's SDK at its other hosts: catalogue and request history."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any, Generic, Literal, TypeVar

from msgspec import field
from starlette.requests import Request

from imaged.catalogue.model import Model
from imaged.errors import BadParameter, UnknownRequest
from imaged.gateway.auth import keyed, public
from imaged.gateway.context import Gateway
from imaged.gateway.present.answer import Answer, Body
from imaged.gateway.present.bodies import Parameters
from imaged.gateway.present.links import Links
from imaged.gateway.present.units import dollars, utc
from imaged.jobs import State
from imaged.params.image_params import plain
from imaged.params.knobs import Knob
from imaged.store.accounts.keys import Key
from imaged.store.jobs import history
from imaged.store.jobs.history import Entry, Search

LIST_KEY = "Inference Segmind Model Information List With Details"
PAGE = 20
MAX_WINDOW_DAYS = 31
PRICED = {"samples", "scheduler", "num_inference_steps", "img_width", "img_height"}
ModelStatus = Literal["COMPLETED", "FAILED", "PENDING"]
Row = TypeVar("Row")
STATES: dict[ModelStatus, tuple[State, ...]] = {
    "COMPLETED": (State.COMPLETED,),
    "FAILED": (State.FAILED, State.CANCELLED),
    "PENDING": (State.QUEUED, State.PROCESSING, State.PARKED),
}
ORDERS = {
    "model_created": "created_at",
    "model_name": "model",
    "credits_deduction": "cost_micros",
}


class ListedParameter(Body):
    label: str
    displayValue: str
    displayOrder: int
    description: str
    component: str
    isRequired: bool
    affectsPricing: bool
    default: Any
    min: float | None
    max: float | None
    options: list[str]
    hidden: bool


class ListedModel(Body):
    title: str
    type: str
    slug: str
    description: str
    parameters: dict[str, ListedParameter]
    is_visible: bool
    is_new: bool
    is_depreciated: bool
    default_image_output: str | None
    thumbnail_image: str | None


class ModelList(Body):
    """The catalogue."""

    models: list[ListedModel] = field(name=LIST_KEY)


class Generation(Body):
    """A picture; money in dollars."""

    id: str
    request_id: str
    created_at: str
    updated_at: str
    model_name: str
    generation_url: str | None
    user_id: str
    user_email: str | None
    status: str
    credits_deduction: float
    latency_ms: int | None
    prompt: str
    parameters: Parameters


class Record(Body):
    """A request, or one picture of it; money in dollars."""

    request_id: str
    model_name: str
    model_status: ModelStatus
    credits_deduction: float
    request_body: Parameters
    generation_url: str | None
    latency_ms: int | None
    created_at: str
    updated_at: str
    error: str | None


class Page(Body, Generic[Row]):
    """Rows from the newest on; total: of all pages."""

    data: list[Row]
    page: int
    per_page: int
    total: int


@public
async def model_list(request: Request) -> Answer[ModelList]:
    """GET /inference-model-information/list: the catalogue as the vendor's SDK lists it."""
    offered = await Gateway.of(request).admission.catalogue()
    return Answer(ModelList([_model(model) for model in offered.values()]))


@keyed
async def recent(request: Request, gateway: Gateway, key: Key) -> Answer[Page[Generation]]:
    """GET /inference-request/recent-generations: the newest pictures of one model."""
    model = request.query_params.get("model_name")
    if not model:
        raise BadParameter("model_name", "is mandatory")
    search = Search(model=model, states=STATES["COMPLETED"])
    return await _page(request, gateway, key, search, PAGE, _generation)


@keyed
async def generations(request: Request, gateway: Gateway, key: Key) -> Answer[Page[Generation]]:
    """GET /inference-request/generations: a key's pictures, newest first."""
    query = request.query_params
    _only_own(request, key)
    search = Search(
        model=query.get("model_name"),
        after=_day(request, "start_date"),
        before=_day(request, "end_date", end=True),
        states=STATES["COMPLETED"],
    )
    return await _page(request, gateway, key, search, PAGE, _generation)


@keyed
async def request_history(request: Request, gateway: Gateway, key: Key) -> Answer[Page[Record]]:
    """GET /inference-request/request-history: a key's requests, the failed ones too."""
    query = request.query_params
    _only_own(request, key)
    status, order = query.get("status"), query.get("sort_by", "model_created")
    direction = query.get("sort_order", "desc")
    _one_of("status", status, STATES, may_miss=True)
    _one_of("sort_by", order, ORDERS)
    _one_of("sort_order", direction, ("asc", "desc"))
    after, before = _window(request)
    search = Search(
        contains=query.get("model_name"),
        after=after,
        before=before,
        states=next((of for name, of in STATES.items() if name == status), tuple(State)),
        order=ORDERS[order],
        descending=direction == "desc",
    )
    per_page = _number(request, "per_page", PAGE, 100)
    return await _page(request, gateway, key, search, per_page, _record)


@keyed
async def request_record(request: Request, gateway: Gateway, key: Key) -> Answer[Record]:
    """GET /inference-request/request-history/{request_id}: one of the key's own requests."""
    request_id = request.path_params["request_id"]
    entry = await gateway.db.query(lambda c: history.one(c, key.id, request_id))
    if entry is None:
        raise UnknownRequest(f"Request {request_id[:64]} not found")
    return Answer(_record(entry, gateway.links(request))[0])


async def _page(
    request: Request,
    gateway: Gateway,
    key: Key,
    search: Search,
    per_page: int,
    rows: Callable[[Entry, Links], list[Row]],
) -> Answer[Page[Row]]:
    page = _number(request, "page", 1, 1_000_000)
    first = (page - 1) * per_page
    entries, total = await gateway.db.query(
        lambda c: history.find(c, key.id, search, first, per_page)
    )
    links = gateway.links(request)
    data = [row for entry in entries for row in rows(entry, links)]
    return Answer(Page(data, page, per_page, total))


def _generation(entry: Entry, links: Links) -> list[Generation]:
    """A row per image that still exists."""
    return [
        Generation(
            id=f"{entry.id}-{k}",
            request_id=entry.id,
            created_at=utc(entry.created_at),
            updated_at=utc(entry.finished_at or entry.created_at),
            model_name=entry.model,
            generation_url=url,
            user_id=str(entry.key_id),
            user_email=None,
            status="COMPLETED",
            credits_deduction=dollars(entry.cost_micros),
            latency_ms=_latency_ms(entry),
            prompt=entry.params.prompt,
            parameters=entry.params.as_dict(),
        )
        for k, url in enumerate(_urls(entry, links))
    ]


def _record(entry: Entry, links: Links) -> list[Record]:
    """A row per image; one for a request without images."""
    state = next(name for name, states in STATES.items() if entry.state in states)
    return [
        Record(
            request_id=entry.id,
            model_name=entry.model,
            model_status=state,
            credits_deduction=dollars(entry.cost_micros),
            request_body=entry.params.as_dict(),
            generation_url=url,
            latency_ms=_latency_ms(entry),
            created_at=utc(entry.created_at),
            updated_at=utc(entry.finished_at or entry.created_at),
            error=entry.error,
        )
        for url in _urls(entry, links)
    ]


def _urls(entry: Entry, links: Links) -> list[str | None]:
    """A link per image, None for deleted ones."""
    if entry.state is not State.COMPLETED:
        return [None]
    if entry.result is None or entry.expires_at is None:
        return [None] * entry.params.samples
    names = [image["name"] for image in entry.result["images"]]
    return [links.signed(name, int(entry.expires_at)) for name in names]


def _latency_ms(entry: Entry) -> int | None:
    if entry.finished_at is None:
        return None
    return round(1000 * (entry.finished_at - entry.created_at))


def _model(model: Model) -> ListedModel:
    return ListedModel(
        title=model.title,
        type="text to image",
        slug=model.slug,
        description=model.description
        or f"{model.title}, from the checkpoint {model.checkpoint_name}.",
        parameters={knob.name: _parameter(knob, place) for place, knob in enumerate(model.knobs)},
        is_visible=True,
        is_new=False,
        is_depreciated=False,
        default_image_output=None,
        thumbnail_image=None,
    )


def _parameter(knob: Knob, place: int) -> ListedParameter:
    return ListedParameter(
        label=knob.name,
        displayValue=knob.name,
        displayOrder=place,
        description=f"{knob.text} {knob.allowed}.",
        component=knob.kind,
        isRequired=knob.required,
        affectsPricing=knob.name in PRICED,
        default=plain(knob.default),
        min=None if knob.kind == "text" else knob.low,
        max=None if knob.kind == "text" else knob.high,
        options=list(knob.choices),
        hidden=False,
    )


def _only_own(request: Request, key: Key) -> None:
    for name, own in (("user_id", str(key.id)), ("user_email", None)):
        if request.query_params.get(name) not in (None, own):
            raise BadParameter(name, "should be your own or absent")


def _number(request: Request, name: str, default: int, high: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= high):
        raise BadParameter(name, f"should be an integer between 1 and {high}")
    return int(text)


def _one_of(name: str, value: str | None, allowed: Any, *, may_miss: bool = False) -> None:
    if value not in allowed and not (may_miss and value is None):
        raise BadParameter(name, "should be one of " + ", ".join(allowed))


def _day(request: Request, name: str, *, end: bool = False) -> float | None:
    """Start of a day in UTC; with `end` that of the next day."""
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        day = date.fromisoformat(text) + timedelta(days=1 if end else 0)
    except (ValueError, OverflowError):
        raise BadParameter(name, "should be a day as YYYY-MM-DD") from None
    return datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()


def _window(request: Request) -> tuple[float, float]:
    """Range of days, by default the last seven; raises BadParameter if it is too long."""
    before, after = _day(request, "to_date", end=True), _day(request, "from_date")
    before = datetime.now(UTC).timestamp() + 86_400 if before is None else before
    after = before - 8 * 86_400 if after is None else after
    if before - after > MAX_WINDOW_DAYS * 86_400 + 86_400:
        raise BadParameter("from_date", f"should be at most {MAX_WINDOW_DAYS} days back")
    return after, before
