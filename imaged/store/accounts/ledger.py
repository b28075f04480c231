"""Ledger: integer micro-dollars in append-only rows, and the balances that they add up to.

balance: granted minus settled. reserved: held by open jobs. reserve, settle and release run in the
transaction that changes the job.
"""

from __future__ import annotations

import sqlalchemy as sa

from imaged.errors import CommandError
from imaged.store.sql.schema import api_keys
from imaged.store.sql.schema import ledger as table

FREE = api_keys.c.balance_micros - api_keys.c.reserved_micros  # SQL: a key's free credits
ENDS = ("settle", "release")
SETTLED = sa.text("ledger.kind = 'settle'")  # literal, so that the partial index is used


def grant(connection: sa.Connection, key_id: int, amount_micros: int, now: float) -> None:
    """Give a key credits."""
    if not _add(connection, key_id, balance=amount_micros):
        raise CommandError(f"there is no key {key_id}; see: imaged keys list")
    _write(connection, key_id, None, "grant", amount_micros, now)


def reserve(
    connection: sa.Connection, key_id: int, job_id: str, amount_micros: int, now: float
) -> bool:
    """Reserve the price of a job; False without enough free credits."""
    reserved = _add(connection, key_id, reserved=amount_micros, if_free=amount_micros)
    if reserved:
        _write(connection, key_id, job_id, "reserve", amount_micros, now)
    return reserved


def settle(
    connection: sa.Connection,
    key_id: int,
    job_id: str,
    amount_micros: int,
    now: float,
    *,
    reserved_micros: int,
) -> None:
    """Charge a job, at most what it reserved. Ending a job twice is an integrity error."""
    assert 0 < amount_micros <= reserved_micros
    _write(connection, key_id, job_id, "settle", amount_micros, now)
    _add(connection, key_id, balance=-amount_micros, reserved=-reserved_micros)


def release(
    connection: sa.Connection, key_id: int, job_id: str, amount_micros: int, now: float
) -> None:
    """Release a job's reserve. Ending a job twice is an integrity error."""
    _write(connection, key_id, job_id, "release", amount_micros, now)
    _add(connection, key_id, reserved=-amount_micros)


def free(connection: sa.Connection, key_id: int) -> int:
    """Free credits of a key: balance minus reserved."""
    return int(connection.execute(sa.select(FREE).where(api_keys.c.id == key_id)).scalar_one())


def used(connection: sa.Connection, key_id: int) -> int:
    """Sum of all charges of a key."""
    total = sa.func.coalesce(sa.func.sum(table.c.amount_micros), 0)
    charges = sa.select(total).where(table.c.key_id == key_id, SETTLED)
    return int(connection.execute(charges).scalar_one())


def audit(connection: sa.Connection) -> list[str]:
    """Differences between balances and ledger rows, in words; empty if there are none."""
    other = table.alias()
    ended = sa.exists().where(other.c.job_id == table.c.job_id, other.c.kind.in_(ENDS))
    sums = (
        sa.select(
            table.c.key_id,
            sa.func.sum(
                sa.case(
                    (table.c.kind == "grant", table.c.amount_micros),
                    (table.c.kind == "settle", -table.c.amount_micros),
                    else_=0,
                )
            ).label("balance"),
            sa.func.sum(
                sa.case(((table.c.kind == "reserve") & ~ended, table.c.amount_micros), else_=0)
            ).label("reserved"),
        )
        .group_by(table.c.key_id)
        .subquery()
    )
    wrong = connection.execute(
        sa.select(
            api_keys.c.id,
            api_keys.c.balance_micros,
            api_keys.c.reserved_micros,
            sums.c.balance,
            sums.c.reserved,
        )
        .join_from(api_keys, sums, sums.c.key_id == api_keys.c.id, isouter=True)
        .where(
            (api_keys.c.balance_micros != sa.func.coalesce(sums.c.balance, 0))
            | (api_keys.c.reserved_micros != sa.func.coalesce(sums.c.reserved, 0))
        )
    )
    return [
        f"key {row.id}: balance {row.balance_micros}, ledger {row.balance}; "
        f"reserved {row.reserved_micros}, ledger {row.reserved}"
        for row in wrong
    ]


def _add(
    connection: sa.Connection,
    key_id: int,
    *,
    balance: int = 0,
    reserved: int = 0,
    if_free: int | None = None,
) -> bool:
    """Add to a key's balance and reserve; False, and nothing changed, without such a key or without
    `if_free` micro-dollars free.
    """
    which = [api_keys.c.id == key_id, *([] if if_free is None else [if_free <= FREE])]
    changed = connection.execute(
        api_keys.update()
        .where(*which)
        .values(
            balance_micros=api_keys.c.balance_micros + balance,
            reserved_micros=api_keys.c.reserved_micros + reserved,
        )
    )
    return bool(changed.rowcount)


def _write(
    connection: sa.Connection, key_id: int, job_id: str | None, kind: str, amount: int, now: float
) -> None:
    connection.execute(
        table.insert().values(key_id=key_id, job_id=job_id, kind=kind, amount_micros=amount, at=now)
    )
