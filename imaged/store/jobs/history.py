"""Request history of a key: jobs that still have a row, and copies of those that were deleted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from imaged.jobs import State
from imaged.params.image_params import ImageParams
from imaged.store.sql.schema import history, jobs

COLUMNS = (
    *("id", "key_id", "model", "params", "state"),
    *("cost_micros", "created_at", "finished_at", "error"),
)


#: The charge: 0 while a job is open, and of a failed one.
_LIVE = {
    "cost_micros": sa.case(
        (jobs.c.remaining_micros.is_not(None), jobs.c.cost_micros), else_=0
    ).label("cost_micros")
}


@dataclass(frozen=True)
class Entry:
    """One request of a key; result: None once its images are deleted."""

    id: str
    key_id: int
    model: str
    params: ImageParams
    state: State
    cost_micros: int
    created_at: float
    finished_at: float | None
    error: str | None
    result: dict[str, Any] | None
    expires_at: float | None


@dataclass(frozen=True)
class Search:
    """Filters; None does not filter."""

    model: str | None = None
    contains: str | None = None  # a part of the model's name
    after: float | None = None
    before: float | None = None
    states: Sequence[State] = tuple(State)
    order: str = "created_at"
    descending: bool = True


def keep(connection: sa.Connection, expired_before: float) -> None:
    """Copy the jobs that are about to be deleted."""
    fields = [_LIVE.get(name, jobs.c[name]) for name in COLUMNS]
    ended = sa.select(*fields).where(jobs.c.expires_at < expired_before)
    connection.execute(history.insert().from_select(list(COLUMNS), ended))


def delete_older(connection: sa.Connection, older_than: float) -> int:
    """Delete entries of requests made before a time; returns how many."""
    return connection.execute(history.delete().where(history.c.created_at < older_than)).rowcount


def find(
    connection: sa.Connection, key_id: int, search: Search, offset: int, limit: int
) -> tuple[list[Entry], int]:
    """A page of the key's requests, and their total number."""
    both = _of_key(key_id).subquery()
    where = _conditions(both, search)
    count = sa.select(sa.func.count()).select_from(both).where(*where)
    total = connection.execute(count).scalar_one()
    order = both.c[search.order]
    page = (
        sa.select(both)
        .where(*where)
        .order_by(order.desc() if search.descending else order.asc(), both.c.id)
        .offset(offset)
        .limit(limit)
    )
    return [_entry(row) for row in connection.execute(page)], int(total)


def one(connection: sa.Connection, key_id: int, job_id: str) -> Entry | None:
    """The key's request of this id, or None."""
    both = _of_key(key_id).subquery()
    row = connection.execute(sa.select(both).where(both.c.id == job_id)).first()
    return _entry(row) if row else None


def _of_key(key_id: int) -> sa.CompoundSelect[Any]:
    """Rows and copies of one key; there is no way to ask for all keys'."""
    live = [_LIVE.get(name, jobs.c[name]) for name in (*COLUMNS, "result", "expires_at")]
    past = [history.c[name] for name in COLUMNS]
    nothing = [sa.null().label("result"), sa.null().label("expires_at")]
    return sa.union_all(
        sa.select(*live).where(jobs.c.key_id == key_id),
        sa.select(*past, *nothing).where(history.c.key_id == key_id),
    )


def _conditions(both: sa.Subquery, search: Search) -> list[sa.ColumnElement[bool]]:
    where: list[sa.ColumnElement[bool]] = [both.c.state.in_(list(search.states))]
    if search.model is not None:
        where.append(both.c.model == search.model)
    if search.contains is not None:
        where.append(both.c.model.contains(search.contains, autoescape=True))
    if search.after is not None:
        where.append(both.c.created_at >= search.after)
    if search.before is not None:
        where.append(both.c.created_at < search.before)
    return where


def _entry(row: Any) -> Entry:
    values = dict(row._mapping)
    values["state"] = State(values["state"])
    values["params"] = ImageParams(**values["params"])
    return Entry(**values)
