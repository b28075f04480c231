"""The queue is a table: put, claim, beat, finish, fail, release, cancel, reap, expire.

A job's moves and its money change in one transaction. Every write of a worker names the epoch
it claimed; when the job has moved on since, the write does nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from imaged.errors import NoCredits, TooFast
from imaged.jobs import MAX_ATTEMPTS, Job, State
from imaged.params import ImageParams
from imaged.store import ledger
from imaged.store.schema import api_keys, jobs, progress, workers

QUEUED = sa.text("jobs.state = 'QUEUED'")  # literal, so that the partial index is used
_JOB = sa.select(jobs, progress.c.calls_done).join_from(
    jobs, progress, progress.c.job_id == jobs.c.id, isouter=True
)


# -- the gateway's side ---------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """What a key may still submit: `left` of `limit` at once, all of it again at `full_at`."""

    limit: int
    left: int
    full_at: float  # seconds since 1970


def put(
    connection: sa.Connection,
    *,
    job_id: str,
    key_id: int,
    model: str,
    params: ImageParams,
    cost_micros: int,
    now: float,
) -> Share:
    """Take a place in the queue and hold its price, or raise TooFast or NoCredits.

    The place is fair between keys: each key has a clock that its jobs' cost moves on, never
    behind the wall clock (start-time fair queueing; a dollar counts as a thousand seconds).
    """
    key = connection.execute(
        sa.select(api_keys).where(api_keys.c.id == key_id).with_for_update()
    ).one()
    bucket = _take_token(key, now)
    tag = max(key.tag, now)
    if not ledger.reserve(connection, key_id, job_id, cost_micros, now):
        raise NoCredits(
            f"Not enough credits: this job costs {cost_micros / 1e6:.6f} and "
            f"{(key.balance_micros - key.reserved_micros) / 1e6:.6f} are left"
        )
    connection.execute(
        api_keys.update()
        .where(api_keys.c.id == key_id)
        .values(bucket=bucket, bucket_at=now, tag=tag + cost_micros / 1000)
    )
    connection.execute(
        jobs.insert().values(
            id=job_id,
            key_id=key_id,
            model=model,
            params=params.as_dict(),
            state=State.QUEUED,
            tag=tag,
            epoch=0,
            attempts=0,
            cost_micros=cost_micros,
            created_at=now,
        )
    )
    return Share(key.rpm, int(bucket), now + (key.rpm - bucket) * 60 / key.rpm)


def _take_token(key: Any, now: float) -> float:
    """What is left in the key's bucket, which refills at `rpm` a minute; raises TooFast."""
    bucket: float = min(float(key.rpm), key.bucket + max(0.0, now - key.bucket_at) * key.rpm / 60)
    if bucket < 1:
        raise TooFast(reset_in_s=(1 - bucket) * 60 / key.rpm, now=now)
    return bucket - 1


def read(connection: sa.Connection, ids: Collection[str]) -> dict[str, Job]:
    """The jobs of these ids that exist."""
    rows = connection.execute(_JOB.where(jobs.c.id.in_(list(ids))))
    return {row.id: _job(row) for row in rows}


def newest(connection: sa.Connection, limit: int = 50) -> list[Job]:
    rows = connection.execute(_JOB.order_by(jobs.c.created_at.desc()).limit(limit))
    return [_job(row) for row in rows]


def depth(connection: sa.Connection) -> int:
    """Jobs that wait."""
    waiting = sa.select(sa.func.count()).select_from(jobs).where(QUEUED)
    return int(connection.execute(waiting).scalar_one())


def cancel(connection: sa.Connection, job_id: str, now: float, retention_s: float) -> bool:
    """End a job that has not ended, give its money back; its worker hears of it by heartbeat."""
    return (
        _end(
            connection,
            [jobs.c.id == job_id],
            State.CANCELLED,
            "cancelled",
            "the job was cancelled",
            now,
            retention_s,
        )
        > 0
    )


# -- the worker's side ----------------------------------------------------------------------


def register(connection: sa.Connection, worker_id: str, pid: int, host: str, now: float) -> None:
    connection.execute(
        workers.insert().values(
            id=worker_id, pid=pid, host=host, started_at=now, seen_at=now, ticked_at=now
        )
    )


def claim(
    connection: sa.Connection,
    worker_id: str,
    models: Collection[str],
    limit: int,
    now: float,
    *,
    alone: bool = True,
) -> list[Job]:
    """Take up to `limit` waiting jobs of these models in this worker's name, fairest first.

    Without a lease there is nothing to take. A job that was there when a worker died is taken by
    itself and only by a worker that is `alone`, with no other job in hand: if it is what kills
    workers, it takes nobody with it.
    """
    leased = sa.exists().where(workers.c.id == worker_id)
    waiting = (
        sa.select(jobs.c.id, jobs.c.attempts)
        .where(QUEUED, jobs.c.model.in_(list(models)), leased)
        .order_by(jobs.c.tag)
    )
    fairest = connection.execute(waiting.limit(1)).first()
    if fairest is None or (fairest.attempts and not alone):
        return []
    if fairest.attempts:
        waiting, limit = waiting.where(jobs.c.id == fairest.id), 1
    else:
        waiting = waiting.where(jobs.c.attempts == 0)
    picked = waiting.limit(limit).with_for_update(skip_locked=True).cte("picked")
    taken = connection.execute(
        jobs.update()
        .where(jobs.c.id.in_(sa.select(picked.c.id)), QUEUED)
        .values(
            state=State.PROCESSING,
            worker_id=worker_id,
            epoch=jobs.c.epoch + 1,
            attempts=jobs.c.attempts + 1,
            started_at=now,
        )
        .returning(jobs)
    ).all()
    return sorted((_job(row) for row in taken), key=lambda job: job.created_at)


def beat(
    connection: sa.Connection,
    worker_id: str,
    now: float,
    ticked_at: float,
    checkpoint: str | None,
    held: Mapping[str, tuple[int, int]],
) -> set[str] | None:
    """Renew the lease and note progress. `held`: job id -> (epoch, UNet calls made).

    Returns the held jobs that are this worker's no more (cancelled, timed out or reclaimed),
    or None if the lease itself is gone and everything with it.
    """
    alive = connection.execute(
        workers.update()
        .where(workers.c.id == worker_id)
        .values(seen_at=now, ticked_at=ticked_at, checkpoint=checkpoint)
    ).rowcount
    if not alive:
        return None
    rows = connection.execute(
        sa.select(jobs.c.id, jobs.c.epoch).where(jobs.c.id.in_(list(held)), _running(worker_id))
    )
    mine = {row.id for row in rows if row.epoch == held[row.id][0]}
    if mine:
        insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
        upsert: Any = insert(progress)
        connection.execute(
            upsert.on_conflict_do_update(
                index_elements=["job_id"], set_={"calls_done": upsert.excluded.calls_done}
            ),
            [{"job_id": job_id, "calls_done": held[job_id][1]} for job_id in mine],
        )
    return set(held) - mine


def finish(
    connection: sa.Connection,
    job: Job,
    worker_id: str,
    result: Mapping[str, Any],
    now: float,
    retention_s: float,
) -> bool:
    """COMPLETED and charged, if the worker still holds this epoch; False if it does not."""
    done = connection.execute(
        jobs.update()
        .where(jobs.c.id == job.id, jobs.c.epoch == job.epoch, _running(worker_id))
        .values(
            state=State.COMPLETED,
            worker_id=None,
            result=dict(result),
            finished_at=now,
            expires_at=now + retention_s,
        )
    )
    if not done.rowcount:
        return False
    ledger.settle(connection, job.key_id, job.id, job.cost_micros, now)
    connection.execute(
        jobs.update()
        .where(jobs.c.id == job.id)
        .values(remaining_micros=ledger.free(connection, job.key_id))
    )
    return True


def fail(
    connection: sa.Connection,
    job: Job,
    worker_id: str,
    reason: str,
    error: str,
    now: float,
    retention_s: float,
) -> bool:
    """FAILED and not charged, if the worker still holds this epoch."""
    where = [jobs.c.id == job.id, jobs.c.epoch == job.epoch, _running(worker_id)]
    return _end(connection, where, State.FAILED, reason, error, now, retention_s) > 0


def release(
    connection: sa.Connection, worker_id: str, now: float, retention_s: float, *, blame: bool
) -> int:
    """A worker has stopped: its jobs wait again, and its lease is gone.

    With `blame` it died, and a job that has been through MAX_ATTEMPTS such deaths fails;
    without, it gave the jobs back in order and the attempt does not count.
    """
    connection.execute(workers.delete().where(workers.c.id == worker_id))
    return _requeue(connection, _running(worker_id), now, retention_s, blame=blame)


# -- anybody's: what time does to jobs ------------------------------------------------------


def reap(
    connection: sa.Connection,
    now: float,
    *,
    lease_s: float,
    queue_s: float,
    run_s: float,
    retention_s: float,
) -> int:
    """Reclaim the jobs of silent workers; fail what waited or ran too long. Returns how many."""
    connection.execute(workers.delete().where(workers.c.seen_at < now - lease_s))
    orphaned = sa.and_(
        jobs.c.state == State.PROCESSING,
        ~sa.exists().where(workers.c.id == jobs.c.worker_id),
    )
    count = _requeue(connection, orphaned, now, retention_s, blame=True)
    count += _end(
        connection,
        [jobs.c.state == State.PROCESSING, jobs.c.started_at < now - run_s],
        State.FAILED,
        "timeout",
        f"the job ran for more than {run_s:.0f} s",
        now,
        retention_s,
    )
    count += _end(
        connection,
        [QUEUED, sa.func.coalesce(jobs.c.started_at, jobs.c.created_at) < now - queue_s],
        State.FAILED,
        "queue_timeout",
        f"the job waited for more than {queue_s:.0f} s",
        now,
        retention_s,
    )
    return count


def expire(connection: sa.Connection, now: float) -> list[Job]:
    """Forget ended jobs past their time; returns them, so that their pictures go as well."""
    gone = connection.execute(jobs.delete().where(jobs.c.expires_at < now).returning(jobs)).all()
    if gone:
        connection.execute(progress.delete().where(progress.c.job_id.in_([row.id for row in gone])))
    return [_job(row) for row in gone]


def _running(worker_id: str) -> sa.ColumnElement[bool]:
    return sa.and_(jobs.c.state == State.PROCESSING, jobs.c.worker_id == worker_id)


def _requeue(
    connection: sa.Connection,
    where: sa.ColumnElement[bool],
    now: float,
    retention_s: float,
    *,
    blame: bool,
) -> int:
    count = 0
    if blame:
        count = _end(
            connection,
            [where, jobs.c.attempts >= MAX_ATTEMPTS],
            State.FAILED,
            "worker_lost",
            "the worker stopped while it made this picture",
            now,
            retention_s,
        )
    attempts = jobs.c.attempts if blame else jobs.c.attempts - 1
    moved = connection.execute(
        jobs.update().where(where).values(state=State.QUEUED, worker_id=None, attempts=attempts)
    )
    return count + moved.rowcount


def _end(
    connection: sa.Connection,
    where: Sequence[Any],
    state: State,
    reason: str,
    error: str,
    now: float,
    retention_s: float,
) -> int:
    """End jobs without a charge; how many."""
    ended = connection.execute(
        jobs.update()
        .where(*where, jobs.c.state.in_((State.QUEUED, State.PROCESSING)))
        .values(
            state=state,
            worker_id=None,
            reason=reason,
            error=error,
            finished_at=now,
            expires_at=now + retention_s,
        )
        .returning(jobs.c.id, jobs.c.key_id, jobs.c.cost_micros)
    ).all()
    for row in ended:
        ledger.release(connection, row.key_id, row.id, row.cost_micros, now)
    return len(ended)


def _job(row: Any) -> Job:
    values = dict(row._mapping)
    values.pop("tag")
    values["state"] = State(values["state"])
    values["params"] = ImageParams(**values["params"])
    values["calls_done"] = values.get("calls_done") or 0
    job = Job(**values)
    return replace(job, calls_done=job.unet_calls) if job.state is State.COMPLETED else job
